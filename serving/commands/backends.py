"""python -m serving backends

Names the backends that a server started here would have, without starting one.
"""

from __future__ import annotations

import argparse
from typing import Any

from serving.embedded import TRITON_VERSION, triton_home
from serving.tritonserver import backend_names, find_tritonserver


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--tritonserver", metavar="PATH", help="this binary instead of PATH, /opt/tritonserver, embedded"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """List them. The version of a native tritonserver is not known before it runs: null."""
    server = find_tritonserver(triton_home(), binary=options.tritonserver)
    return {
        "server": server.origin,
        "version": TRITON_VERSION if server.embedded_home else None,
        "backends": backend_names(server),
    }
