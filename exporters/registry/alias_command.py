"""python -m exporters alias NAME VERSION ALIAS

Let an alias of a registered model point to a version; VERSION is a number or another alias. Who moved it, when, and from
which version is kept in tags of the model, as `python -m training promote` does, which this is with the alias named last. To go
back, name the version that was there before ("from_version" of the last line).
"""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME, VERSION, ALIAS and --tracking-uri."""
    parser.add_argument("name", metavar="NAME", help="name of the model in MLflow's registry")
    parser.add_argument(
        "version", metavar="VERSION", help="number of a version, or one of the model's aliases"
    )
    parser.add_argument("alias", metavar="ALIAS", help="alias to move, such as champion")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow store, as for training")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Move the alias; raises as `training.tracking.registry.promote`."""
    from training.tracking import registry

    return registry.promote(options.name, options.version, alias=options.alias, uri=options.tracking_uri)
