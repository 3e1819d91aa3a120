"""python -m serving rollback [--name INSTANCE]

Moves a running server back to the release that it served before. That one is still loaded, so it takes milliseconds, and
no request fails. A second `rollback` comes forward again.
"""

from __future__ import annotations

import argparse
from typing import Any

from serving.releases.asking import add_order_arguments, held


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_order_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Roll back; returns what the command prints."""
    from serving.releases.switching import rollback

    with held(options) as (live, server, order):
        return {"event": "rollback", **rollback(live, server, order)}
