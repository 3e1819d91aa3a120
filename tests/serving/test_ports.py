"""Ports that were chosen stay free for the server that is started there, and for nobody else."""

from __future__ import annotations

import contextlib
import socket

import pytest

from serving.errors import PortInUse
from serving.ports import HeldPorts

LOOPBACK = "127.0.0.1"
HELD, OTHERS = 64, 900  # of the system's 28,000: were they not held, four would be given again


def test_the_system_gives_a_held_port_to_nobody_else() -> None:
    wanted = {str(number): (LOOPBACK, 0) for number in range(HELD)}
    with HeldPorts(wanted) as held, contextlib.ExitStack() as others:
        assert len(set(held.numbers.values())) == len(wanted)
        for number in range(OTHERS):
            other = others.enter_context(socket.socket())
            if number % 2:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind((LOOPBACK, 0))
            assert other.getsockname()[1] not in held.numbers.values()


def test_a_server_listens_on_a_held_port_again_and_again() -> None:
    with HeldPorts({"http": (LOOPBACK, 0)}) as held:
        for _ in range(2):
            with (
                socket.create_server((LOOPBACK, held.numbers["http"])) as server,
                socket.create_connection(server.getsockname()),
            ):
                taken, _ = server.accept()
                taken.close()


def test_a_port_where_somebody_listens_is_refused_and_nothing_stays_held() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        with HeldPorts({"one": (LOOPBACK, 0)}) as free:
            number = free.numbers["one"]
        with pytest.raises(PortInUse, match=f"http port {port} on {LOOPBACK} cannot be used"):
            HeldPorts({"grpc": (LOOPBACK, number), "http": (LOOPBACK, port)})
        with socket.socket() as strict:  # without SO_REUSEADDR it fails on a held port
            strict.bind((LOOPBACK, number))
