"""python -m exporters fetch-release models:/NAME@ALIAS (--out DIR | --releases DIR)

Copy a release out of MLflow's registry, and check every file of it. With --out, DIR must not exist. With --releases it comes
to DIR/<release_id>; where that is already, it is only checked, so the command can be repeated every minute. The last line
of stdout says where it is (`release`), what it is, and whether anything was copied (`changed`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --out or --releases, and --tracking-uri."""
    parser.add_argument(
        "model", metavar="MODEL", help="models:/NAME@ALIAS or models:/NAME/VERSION of a registered release"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR", help="directory of the release; must not exist")
    where.add_argument("--releases", type=Path, metavar="DIR", help="directory of releases, one a release_id")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow store, as for training")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Fetch it; raises as `exporters.registry.releases.fetch_release`."""
    from exporters.registry.releases import fetch_release

    return fetch_release(
        options.model, directory=options.out, below=options.releases, tracking_uri=options.tracking_uri
    )
