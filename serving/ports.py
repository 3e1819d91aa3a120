"""Choosing the ports of an instance."""

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


def choose_ports(options: UpOptions) -> Addresses:
    """Check that the ports are free, and find free ones for 0.

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
    chosen = free_ports(wanted)
    return Addresses(
        options.host, http_host, chosen["http"], chosen["grpc"], chosen["metrics"], chosen["health"]
    )


def free_ports(wanted: Mapping[str, tuple[str, int]]) -> dict[str, int]:
    """Check that ports are free, and find free ones for 0.

    Args:
        wanted: what a port is for, as in its option `--<what>-port`, to address and number.

    Raises PortInUse naming the port, or the address that this machine does not have.
    """
    asked = [port for _, port in wanted.values() if port]
    if len(set(asked)) < len(asked):
        raise PortInUse(f"the ports must differ, not {asked}.")
    held, chosen = [], {}
    try:
        for what, (host, port) in sorted(wanted.items(), key=lambda item: item[1][1] == 0):
            holder = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            held.append(holder)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                holder.bind((host, port))
                holder.listen(1)
            except (OSError, OverflowError) as error:
                raise PortInUse(
                    f"{what} port {port} on {host} cannot be used: {error}. Stop what listens there, or choose "
                    f"another one: --{what}-port N (0 takes a free one)."
                ) from error
            chosen[what] = holder.getsockname()[1]
    finally:
        for holder in held:
            holder.close()
    return chosen
