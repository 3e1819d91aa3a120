"""python -m deploy down

Stops the stack that `python -m deploy up` brought up, the gateway before what is behind it. No process, port or shared memory
is left; certificate, keys, metrics and logs stay in the state directory. Exit code 1 if anything was left behind.
"""

from __future__ import annotations

import argparse
from typing import Any

from deploy.commands.state import add_state, state_of
from deploy.local import STOP_S, down


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--timeout-s", type=float, default=STOP_S, metavar="S", help="then kill it (default %(default)s)"
    )
    add_state(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Stop it."""
    return down(state_of(options), options.timeout_s)
