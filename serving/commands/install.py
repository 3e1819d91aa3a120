"""python -m serving install

Puts the embedded tritonserver and the Python of its stubs into .triton/ (or $CLOTLINE_TRITON_HOME).
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from serving.embedded import TRITON_VERSION, install, triton_home


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--force", action="store_true", help="install again even if it is there")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Install; returns where."""
    home = triton_home()
    fresh = install(home, force=options.force)
    done = "installed" if fresh else "is there already"
    print(f"serving: tritonserver {TRITON_VERSION} {done} in {home}", file=sys.stderr)
    return {"installed": str(home), "fresh": fresh, "version": TRITON_VERSION}
