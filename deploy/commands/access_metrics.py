"""python -m deploy access-metrics --log .triton/deploy/gateway/access.log --port 8004 --certificate server.pem

Metrics of the gateway for Prometheus, from nginx's access log: requests by protocol, route, status and key id, durations,
bytes, and when certificates expire. Begins at the end of the log; rotation and truncation are followed. Until Ctrl-C.
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

from deploy.access_metrics import AccessMetrics, CertificateExpiry, LogFollower, follow
from deploy.errors import DeployError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `access-metrics`."""
    parser.add_argument(
        "--log", type=Path, required=True, metavar="FILE", help="nginx's access log; it may come later"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8004, help="(default %(default)s)")
    parser.add_argument(
        "--certificate", "--certificates", dest="certificates", type=Path, nargs="*", default=[], metavar="PEM",
        help="certificates whose expiry is told",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """`access-metrics`; raises DeployError."""
    from prometheus_client import start_http_server

    metrics = AccessMetrics()
    metrics.registry.register(CertificateExpiry(options.certificates))
    follower = LogFollower(options.log)
    try:
        server, _ = start_http_server(options.port, options.host, metrics.registry)
    except OSError as error:
        raise DeployError(f"--port {options.port} on {options.host} cannot be used: {error}.") from error
    try:
        follow(metrics, follower, threading.Event())
    finally:
        server.shutdown()
        follower.close()
    return 0
