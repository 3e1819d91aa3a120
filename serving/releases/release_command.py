"""python -m serving release RELEASE [--name INSTANCE]

Moves a running server from the release that it serves to another one, without a failed request: copies and checks the
files, loads the models beside those in use, compares their answers with the release's golden examples, and only then leads
the public models to them, all at once. Whatever fails before that leaves the server as it was. The release before stays
loaded, for `rollback`. docs/live_releases.md tells what a client sees.

The server has to have been started on a live directory (`python -m serving up --live DIR`). With --live DIR and no server
on it, the directory is changed for the next start; then only checksums are compared.

All requests move at once. To try a release on a share of them first: python -m deploy canary start RELEASE --share 10%.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from serving.releases.asking import add_order_arguments, held


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "release",
        metavar="RELEASE",
        type=Path,
        help="directory that `python -m exporters export --release` wrote",
    )
    add_order_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Release; returns what the command prints."""
    from serving.releases.bundle import read_bundle
    from serving.releases.switching import release

    bundle = read_bundle(options.release)
    with held(options) as (live, server, order):
        return {"event": "release", **release(live, server, bundle, order)}
