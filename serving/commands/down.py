"""python -m serving down --name NAME

Stops one server, or all servers of this checkout. Exit code 1 if anything of one was left behind.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from serving.embedded import triton_home
from serving.errors import InstanceError
from serving.instances import instances, stop_instance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--name", help="only this instance")
    parser.add_argument("--timeout-s", type=float, default=30.0, help="then kill it (default %(default)s)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Stop them; returns their names."""
    home = triton_home()
    chosen = [state for state in instances(home) if options.name in (None, state.name)]
    if options.name and not chosen:
        raise InstanceError(f"no server named {options.name} is up; `python -m serving status` lists them.")
    clean = True
    for state in chosen:
        clean = stop_instance(home, state, options.timeout_s) and clean
        print(f"serving: {state.name} on {state.http} stopped", file=sys.stderr)
    if not chosen:
        print("serving: no server is up", file=sys.stderr)
    return {"stopped": [state.name for state in chosen], "clean": clean, "exit_code": 0 if clean else 1}
