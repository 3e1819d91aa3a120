"""`--state DIR`, which the commands share: whose keys, certificate and processes they are about."""

from __future__ import annotations

import argparse
from pathlib import Path

from serving.embedded import triton_home


def add_state(parser: argparse.ArgumentParser) -> None:
    """Add the option."""
    parser.add_argument(
        "--state", type=Path, metavar="DIR", help="state of the stack (default .triton/deploy)"
    )


def state_of(options: argparse.Namespace) -> Path:
    """The state directory that was asked for, else `deploy` beside the state of `serving`."""
    return Path(options.state or triton_home() / "deploy").resolve()
