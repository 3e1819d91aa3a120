"""python -m deploy dashboards
python -m deploy dashboards --check

Writes Grafana's dashboards, docker/grafana/dashboards/*.json, from deploy/dashboards*.py. With --check nothing is written,
and the exit code is 1 if a file is not what the code gives. See docs/monitoring.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).resolve().parents[2] / "docker" / "grafana" / "dashboards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument(
        "--out", type=Path, default=DIRECTORY, metavar="DIR", help="of the files (default %(default)s)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Write or compare."""
    from deploy.dashboards_grafana import out_of_date, write

    if options.check:
        stale = out_of_date(options.out)
        return {"directory": str(options.out), "out_of_date": stale, "exit_code": 1 if stale else 0}
    return {"directory": str(options.out), "changed": write(options.out)}
