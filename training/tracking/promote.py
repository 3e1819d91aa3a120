"""python -m training promote NAME VERSION --alias champion

Let an alias of a registered model point to a version; VERSION is a number or another alias, such as challenger. Nothing
else moves `champion`. Who moved it, when, and from which version is kept in tags of the model. To go back, promote the
version that was there before ("from_version" of the last line).
"""

from __future__ import annotations

import argparse
from typing import Any

from training.tracking import registry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME, VERSION, --alias and --tracking-uri."""
    parser.add_argument("name", metavar="NAME", help="name of the model in MLflow's registry")
    parser.add_argument(
        "version", metavar="VERSION", help="number of a version, or one of the model's aliases"
    )
    parser.add_argument("--alias", default="champion", help="alias to move (default: %(default)s)")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow store, as for training")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Move the alias; raises as `registry.promote`."""
    return registry.promote(options.name, options.version, alias=options.alias, uri=options.tracking_uri)
