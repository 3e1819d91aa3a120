"""python -m exporters register RELEASE --name NAME

Make a release a version of a model in MLflow's registry. Its parity figures, status, metrics and the SHA-256 of its
manifest become tags; its files become artefacts, so that `fetch-release` and `python -m serving follow` can have them from there.
The version is linked to the run that its checkpoint came from. A release is registered once: the second time finds the first.
No alias moves; that is what `alias` is for.
"""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RELEASE, --name, --manifest-only, --no-link and --tracking-uri."""
    parser.add_argument("release", metavar="RELEASE", help="directory that `export --release` wrote")
    parser.add_argument(
        "--name", required=True, metavar="NAME", help="of the model in the registry, such as clotline-release"
    )
    parser.add_argument(
        "--manifest-only", action="store_true", help="keep manifest, card and plots there, and not the models"
    )
    parser.add_argument(
        "--no-link", action="store_true", help="do not link it to the run that its checkpoint came from"
    )
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow store, as for training")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Register it; raises as `exporters.registry.releases.register_release`."""
    from exporters.registry.releases import register_release

    return register_release(
        options.release,
        options.name,
        tracking_uri=options.tracking_uri,
        whole=not options.manifest_only,
        link=not options.no_link,
    )
