"""A closed loop that costs little: one thread, one epoll, requests that were built beforehand.

Every connection sends its next request as soon as it has the whole answer to the one before. Nothing is parsed while the
clock runs but what tells the end of an answer; the answers are kept, and checked afterwards. Sending a tile of 120 kB costs
the machine about as much as the kernel's copy of it: the figures of `bench` say how much (`load_cpu_s_per_1000`).
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from perf.errors import LoadError
from perf.load import LoadFigures

RECEIVE_BYTES = 1 << 16
_SEND_BUFFER_BYTES = 1 << 20
_SILENCE_S = 30.0


class Connection(ABC):
    """One request in flight over one TCP connection of its own.

    Args:
        host, port: of the server. Raises LoadError where nobody listens.
    """

    def __init__(self, host: str, port: int) -> None:
        try:
            self.socket = socket.create_connection((host, port), timeout=10)
        except OSError as error:
            raise LoadError(f"no connection to {host}:{port}: {error}. Is the server up?") from error
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self.socket.setblocking(False)
        self.index = 0
        self.started_s = 0.0

    @abstractmethod
    def begin(self, index: int) -> None:
        """Begin to send the request of that index."""

    @abstractmethod
    def continue_sending(self) -> None:
        """The socket takes more."""

    @abstractmethod
    def receive(self) -> bytes | None:
        """The socket has more. Returns the answer once it is whole; raises LoadError if none will come."""

    @property
    @abstractmethod
    def blocked(self) -> bool:
        """Whether something is left to be sent when the socket takes more."""


def closed_loop(
    connect: Callable[[], Connection],
    requests: int,
    concurrency: int,
    seconds: float,
    warm_up_s: float = 0.5,
) -> tuple[LoadFigures, list[tuple[int, bytes]]]:
    """Keep one request in flight on every connection; returns what was seen, and (index of the request, answer) of all.

    Args:
        connect: opens a connection; it is closed in the end.
        requests: how many different ones there are; they are sent in turns.
        concurrency: connections, each with one request in flight.
        seconds: how long answers count.
        warm_up_s: before that, answers are kept but do not count.

    Raises:
        LoadError: no connection, a broken one, an error for an answer, or silence.
    """
    with contextlib.ExitStack() as opened:
        connections = []
        for _ in range(concurrency):
            connections.append(connect())
            opened.callback(connections[-1].socket.close)
        poll = opened.enter_context(select.epoll())
        for connection in connections:
            poll.register(connection.socket, select.EPOLLIN)
        try:
            return _run(poll, connections, requests, seconds, warm_up_s)
        except OSError as error:
            raise LoadError(f"the connection to the server broke: {error}") from error


def _run(
    poll: select.epoll, connections: Sequence[Connection], requests: int, seconds: float, warm_up_s: float
) -> tuple[LoadFigures, list[tuple[int, bytes]]]:
    by_descriptor = {connection.socket.fileno(): connection for connection in connections}
    answers: list[tuple[int, bytes]] = []
    latencies_s: list[float] = []
    waiting_to_send: set[int] = set()
    sent = 0
    clock = time.perf_counter

    def begin(connection: Connection, now_s: float) -> None:
        nonlocal sent
        connection.index, connection.started_s = sent % requests, now_s
        connection.begin(connection.index)
        sent += 1

    def watch(descriptor: int, connection: Connection) -> None:
        """Wait for room to send only where there is something to send."""
        if connection.blocked != (descriptor in waiting_to_send):
            waiting_to_send.symmetric_difference_update((descriptor,))
            poll.modify(descriptor, select.EPOLLIN | (select.EPOLLOUT if connection.blocked else 0))

    for descriptor, connection in by_descriptor.items():
        begin(connection, clock())
        watch(descriptor, connection)
    counted_from_s = clock() + warm_up_s
    started_cpu_s = time.process_time()
    counts = False
    while True:
        ready = poll.poll(_SILENCE_S)
        if not ready:
            raise LoadError(f"the server gave no answer for {_SILENCE_S:.0f} s")
        for descriptor, event in ready:
            connection = by_descriptor[descriptor]
            if event & select.EPOLLOUT:
                connection.continue_sending()
            answer = connection.receive() if event & ~select.EPOLLOUT else None
            if answer is not None:
                now_s = clock()
                if not counts and now_s >= counted_from_s:
                    counted_from_s, counts = now_s, True
                elif counts:
                    latencies_s.append(now_s - connection.started_s)
                    if now_s >= counted_from_s + seconds:
                        cpu_s = time.process_time() - started_cpu_s
                        return _figures(latencies_s, now_s - counted_from_s, cpu_s), answers
                answers.append((connection.index, answer))
                begin(connection, now_s)
            watch(descriptor, connection)


def _figures(latencies_s: Sequence[float], seconds: float, load_cpu_s: float) -> LoadFigures:
    latencies_ms = 1000 * np.asarray(latencies_s)
    return LoadFigures(
        requests_per_s=len(latencies_ms) / seconds,
        mean_ms=float(latencies_ms.mean()),
        p50_ms=float(np.percentile(latencies_ms, 50)),
        p95_ms=float(np.percentile(latencies_ms, 95)),
        load_cpu_s=load_cpu_s,
    )
