"""python -m exporters preflight RELEASE --container 26.07

Says before a download of 10 GB whether each model of a release (or of a Triton model repository) would load in NVIDIA's
Triton container of that tag, or in the embedded server (--container embedded). Files are read, nothing is started. What is known of
containers, and where it is said, is a table of this package; what is not known there is called unknown. Exit code: 0 nothing
is known to fail (unknown ones are marked; --strict makes them a failure); 1 something does not load; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "release", type=Path, metavar="RELEASE", help="a release, or a Triton model repository"
    )
    parser.add_argument(
        "--container",
        required=True,
        metavar="TAG",
        help="tag of nvcr.io/nvidia/tritonserver: 26.07, 26.07-py3, 26.07-trtllm-python-py3 ...; or: embedded",
    )
    parser.add_argument(
        "--adds",
        default="",
        metavar="MODULES",
        help="comma-separated Python modules that your image has beside the container's own, such as slides,cv2",
    )
    parser.add_argument("--strict", action="store_true", help="exit code 1 also for what is unknown")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Look, print a table, and return it; see the module."""
    from exporters.preflight.report import as_json, as_text, preflight  # protobuf: --help needs none of it

    report = preflight(
        options.release,
        options.container,
        adds=frozenset(name.strip() for name in options.adds.split(",") if name.strip()),
    )
    with contextlib.suppress(BrokenPipeError):  # its reader has gone: the caller sees to that
        print(as_text(report), flush=True)
    failed = report.fails or (options.strict and report.leaves_open)
    return {**as_json(report), "exit_code": int(failed)}
