"""python -m serving follow models:/clotline@champion [--name INSTANCE ...]

Keeps servers on the release that an alias of MLflow's model registry names: asks the registry every --every-s seconds,
fetches a release that is new, and moves each server as `release` does. A report tells which server serves what, and which
of them drift; it is printed when something changed. --once looks once: exit code 1 if a server drifts afterwards.

A server that refused a release, or that somebody rolled back from it, is left alone until the alias moves again. The
registry is asked by `python -m exporters fetch-release`, which needs `clotline[track]`; this process needs none of it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from serving.releases.asking import seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("uri", metavar="MODEL", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("--name", metavar="INSTANCE", action="append",
                        help="follow with this server; may be repeated (default: all on live directories)")  # fmt: skip
    parser.add_argument("--releases", metavar="DIR", type=Path,
                        help="where fetched releases are kept (default: .triton/releases)")  # fmt: skip
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow's server or store, handed on")
    parser.add_argument("--every-s", metavar="S", type=seconds, default=30.0,
                        help="between two looks at the registry (default %(default)g)")  # fmt: skip
    parser.add_argument("--once", action="store_true", help="look once, report, and end")
    parser.add_argument("--report", action="store_true", help="only report; move no server (implies --once)")
    parser.add_argument("--timeout-s", metavar="S", type=seconds, default=300.0,
                        help="for one model to load, or to answer (default %(default)g)")  # fmt: skip
    parser.add_argument("--drain-s", metavar="S", type=seconds, default=30.0,
                        help="wait this long for the last answers of the release before (default %(default)g)")  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Follow; returns the last report."""
    import json
    import sys

    from serving.embedded import triton_home
    from serving.releases.errors import SourceUnavailable
    from serving.releases.following import Follower, fetch

    folder = options.releases or triton_home() / "releases"
    follower = Follower(options.uri, options.name, options.timeout_s, options.drain_s)
    told = None
    while True:
        try:
            fetched = fetch(options.uri, folder, options.tracking_uri)
            report = follower.look(fetched, move=not options.report)
        except SourceUnavailable as error:
            if options.once or options.report:
                raise
            report = {**follower.standing(), "error": str(error)}
        if options.once or options.report:
            return {**report, "exit_code": 1 if report["drifting"] else 0}
        news = json.dumps(report, separators=(",", ":"))
        if news != told:
            print(news, flush=True)
            if "error" in report:
                print(f"serving: {report['error']}", file=sys.stderr, flush=True)
            told = news
        time.sleep(options.every_s)
