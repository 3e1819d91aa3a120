"""python -m serving up --repository model_repository
python -m serving up --release RELEASE

Starts Triton Inference Server on a model repository or a Release, proves that it computes, and says so in one JSON
line. Then it supervises it until Ctrl-C: dead parts are replaced, and GET /live and GET /ready on the health port tell
how it is. See docs/serving.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from serving.embedded import triton_home
from serving.launcher import UpOptions, up, up_detached
from serving.tritonserver import RESTRICTED_APIS, Security


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--repository", type=Path, metavar="DIR", help="Triton model repository, served as it is"
    )
    parser.add_argument("--release", type=Path, metavar="DIR", help="Release to serve (python -m exporters)")
    parser.add_argument(
        "--live",
        type=Path,
        metavar="DIR",
        help="keep what is served in DIR, for `release` and `rollback` to last",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument(
        "--http-host", help="another one for HTTP (default: --host, but 127.0.0.1 where gRPC has TLS)"
    )
    for what, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        parser.add_argument(
            f"--{what}-port", type=int, default=port, help="0 takes a free one (default %(default)s)"
        )
    parser.add_argument(
        "--health-port",
        type=int,
        help="0 takes a free one (default 8003 beside --http-port 8000, else a free one)",
    )
    parser.add_argument("--name", help="name of this instance (default: its HTTP port)")
    parser.add_argument(
        "--tritonserver", metavar="PATH", help="this binary instead of PATH, /opt/tritonserver, embedded"
    )
    parser.add_argument(
        "--timeout-s", type=float, default=120.0, help="to be ready within (default %(default)s)"
    )
    parser.add_argument(
        "--detach", action="store_true", help="return once it is ready, leaving it in the background"
    )
    parser.add_argument(
        "--grpc-tls-cert", type=Path, metavar="PEM", help="encrypt gRPC with this certificate"
    )
    parser.add_argument("--grpc-tls-key", type=Path, metavar="PEM", help="and its key, without a password")
    parser.add_argument(
        "--grpc-tls-ca",
        type=Path,
        metavar="PEM",
        help="let in only clients whose certificate this one has signed",
    )
    parser.add_argument("--open-api", action="append", default=[], metavar="API",
                        help="needs no admin token then, may be repeated: " + ", ".join(RESTRICTED_APIS[1:]))  # fmt: skip
    parser.add_argument("--triton-arg", action="append", default=[], metavar="ARG",
                        help="passed on to tritonserver, e.g. --triton-arg=--log-verbose=1; may be repeated")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Start it; returns the exit code once it has stopped, or is ready if it runs in the background."""
    if options.detach:
        rest = [word for word in options.words if word != "--detach"]
        print(up_detached(rest, triton_home(), options.timeout_s))
        return 0
    security = Security(
        tuple(options.open_api), options.grpc_tls_cert, options.grpc_tls_key, options.grpc_tls_ca
    )
    return up(
        UpOptions(
            home=triton_home(),
            repository=options.repository,
            live=options.live,
            release=options.release,
            host=options.host,
            http_host=options.http_host,
            http_port=options.http_port,
            grpc_port=options.grpc_port,
            metrics_port=options.metrics_port,
            health_port=options.health_port,
            name=options.name,
            tritonserver=options.tritonserver,
            timeout_s=options.timeout_s,
            security=security,
            extra=options.triton_arg,
        )
    )
