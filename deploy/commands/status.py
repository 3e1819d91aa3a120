"""python -m deploy status

Says which parts of the stack run, whether each is ready, where it listens, and which alerts Prometheus has. Exit code 0 if
all are ready, 1 if not, or if no stack is up.
"""

from __future__ import annotations

import argparse
from typing import Any

from deploy.commands.state import add_state, state_of
from deploy.local_report import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="the JSON line alone, without the table")
    add_state(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Look at all of it."""
    told = report(state_of(options))
    if not options.json:
        for part in told["parts"]:
            restarts = f", started {part['restarts']} times again" if part["restarts"] else ""
            condition = "ready" if part["ready"] else "NOT READY"
            print(f"{part['name']:16}{condition:11}{part['address']}{restarts}")
            if not part["ready"]:
                print(f"{'':16}{part['reason']}")
        for alert in told.get("alerts", []):
            print(f"{'alert':16}{alert['state']:11}{alert['name']} {alert['summary']}")
        if not told["parts"]:
            print("no stack is up; `python -m deploy up` starts one")
    return {**told, "exit_code": 0 if told["ready"] else 1}
