"""python -m deploy shadow --stable-http 127.0.0.1:8000 --stable-grpc 127.0.0.1:8001 --candidate-http 127.0.0.1:8100 --candidate-grpc 127.0.0.1:8101 --log differences.jsonl

Asks a candidate release what clients ask the one that serves, and counts how their answers differ. Takes copies of requests
from nginx (`mirror`), REST and gRPC, on the paths that Triton has; clients notice nothing. GET /metrics is for Prometheus,
GET /health answers 200. Until Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import re
import signal
from pathlib import Path

from deploy.errors import DeployError, UsageError

_ADDRESS = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
_SERVERS = ("stable", "candidate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `shadow`."""
    for server, what in zip(_SERVERS, ("the server whose answers clients get", "the other one"), strict=True):
        for protocol in ("http", "grpc"):
            parser.add_argument(f"--{server}-{protocol}", required=True, metavar="HOST:PORT", help=what)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8005, help="(default %(default)s)")
    parser.add_argument(
        "--log", type=Path, metavar="FILE",
        help="requests with another label or a failure, as JSON lines; 16 MB, and as much in FILE.1",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """`shadow`; raises DeployError."""
    given = {
        f"--{server}-{protocol}": getattr(options, f"{server}_{protocol}")
        for server in _SERVERS
        for protocol in ("http", "grpc")
    }
    wrong = [f"{option} {address}" for option, address in given.items() if not _is_address(address)]
    if wrong:
        raise UsageError(f"not host:port, as in 127.0.0.1:8000: {', '.join(wrong)}.")

    from deploy.shadow import Shadow, ShadowServer, ShadowSettings

    stable = (options.stable_http, options.stable_grpc)
    candidate = (options.candidate_http, options.candidate_grpc)
    try:
        shadow = Shadow(ShadowSettings(stable, candidate, options.log))
    except OSError as error:
        raise DeployError(f"--log {options.log} cannot be written: {error}.") from error
    try:
        server = ShadowServer(shadow, options.host, options.port)
    except (OSError, OverflowError) as error:
        raise DeployError(f"--port {options.port} on {options.host} cannot be used: {error}.") from error
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)
    finally:
        server.server_close()
        shadow.close()
    return 0


def _is_address(text: str) -> bool:
    found = _ADDRESS.fullmatch(text)
    return found is not None and 0 < int(found[1]) < 65536
