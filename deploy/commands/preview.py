"""python -m deploy preview --prometheus http://127.0.0.1:9090 --out runs/dashboards.html

Draws the panels of Grafana's dashboards into one page of HTML, without Grafana: the same expressions, asked of a running
Prometheus. The last line says how many panels there are and which had no data.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploy.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--prometheus", default="http://127.0.0.1:9090", metavar="URL", help="default %(default)s"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="page to write")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="how far back it looks (default %(default)s)"
    )
    parser.add_argument(
        "--rate-interval",
        default="1m",
        metavar="DURATION",
        help="window of rates, four scrapes or more (default %(default)s)",
    )
    parser.add_argument(
        "--server", default=".*", metavar="REGEX", help="servers that are shown (default: all)"
    )
    parser.add_argument("--model", default=".*", metavar="REGEX", help="models that are shown (default: all)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Ask, draw, write."""
    from deploy.preview import Span, preview, write
    from deploy.preview_prometheus import Prometheus

    if not options.minutes > 0:
        raise UsageError(f"--minutes {options.minutes:g}: must be more than 0.")
    span = Span(options.minutes, options.rate_interval, options.server, options.model)
    page = preview(Prometheus(options.prometheus), span)
    write(page, options.out)
    return {"page": str(options.out), "panels": page.panels, "without_data": page.empty}
