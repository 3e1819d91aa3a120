"""Choosing the ports of an instance, and holding them until its servers listen there."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

from serving.errors import PortInUse
from serving.tritonserver import Addresses

if TYPE_CHECKING:
    from serving.launcher import UpOptions

HTTP_PORT, HEALTH_PORT = 8000, 8003
LOOPBACK = "127.0.0.1"


class HeldPorts:
    """Ports that the system gives to nobody who asks for a free one, and to no outgoing connection, until `close`.

    A socket that is bound and does not listen holds each: who binds that very port with SO_REUSEADDR, as Triton's
    servers, nginx and Prometheus do, still gets it (socket(7)). Hold them for as long as a server may be started there.

    Args:
        wanted: what a port is for, as in its option `--<what>-port`, to address and number; 0 is any free one.

    Raises PortInUse naming the port that cannot be had, or the address that this machine does not have.
    """

    def __init__(self, wanted: Mapping[str, tuple[str, int]]) -> None:
        asked = [port for _, port in wanted.values() if port]
        if len(set(asked)) < len(asked):
            raise PortInUse(f"the ports must differ, not {asked}.")
        self._sockets: list[socket.socket] = []
        self.numbers: dict[str, int] = {}
        try:
            for what, (host, port) in sorted(wanted.items(), key=lambda item: item[1][1] == 0):
                try:
                    if port:
                        with _bound(host, port) as tried:
                            tried.listen(1)  # which another one that listens there forbids
                    self._sockets.append(_bound(host, port))
                except (OSError, OverflowError) as error:
                    raise PortInUse(
                        f"{what} port {port} on {host} cannot be used: {error}. Stop what listens there, or choose "
                        f"another one: --{what}-port N (0 takes a free one)."
                    ) from error
                self.numbers[what] = self._sockets[-1].getsockname()[1]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let them go."""
        for holder in self._sockets:
            holder.close()

    def __enter__(self) -> HeldPorts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bound(host: str, port: int) -> socket.socket:
    holder = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((host, port))
    except BaseException:
        holder.close()
        raise
    return holder


def choose_ports(options: UpOptions) -> tuple[Addresses, HeldPorts]:
    """Check that the ports are free, find free ones for 0, and hold them.

    Where gRPC is encrypted, HTTP, which Triton cannot encrypt, stays on the loopback address unless told otherwise.
    The health port is 8003 beside the HTTP port 8000 and a free one beside another, unless told otherwise.

    Raises PortInUse naming the port, or the address that this machine does not have.
    """
    encrypted = options.security.grpc_tls != "off"
    http_host = options.http_host or (LOOPBACK if encrypted else options.host)
    health_port = options.health_port
    if health_port is None:
        health_port = HEALTH_PORT if options.http_port == HTTP_PORT else 0
    wanted = {
        "http": (http_host, options.http_port),
        "grpc": (options.host, options.grpc_port),
        "metrics": (options.host, options.metrics_port),
        "health": (options.host, health_port),
    }
    held = HeldPorts(wanted)
    numbers = [held.numbers[what] for what in ("http", "grpc", "metrics", "health")]
    return Addresses(options.host, http_host, *numbers), held
