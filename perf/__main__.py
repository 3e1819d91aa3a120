"""python -m perf bench --repository runs/perf/resnet18

Measures how fast a model repository is served, against LIMIT: the same decoding, resizing and network in a bare loop of
this machine without any server. Each command explains itself with --help; its last line on standard output is one JSON
document.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from perf.errors import PerfError
from training.commands import Command
from training.commands import main as run_command

COMMANDS = {
    "install": Command("perf.install", "put a perf_analyzer that runs here into .triton/perf"),
    "models": Command("perf.models", "make a repository with random weights to measure"),
    "release": Command("perf.releases", "make a Release with random weights, by the exporter"),
    "inputs": Command("perf.inputs", "write input files with real JPEG tiles for perf_analyzer"),
    "limit": Command("perf.limit", "what this machine can do without a server"),
    "bench": Command("perf.bench", "the served models against that limit, in alternation"),
    "slides": Command("perf.slides", "whole slides against that limit"),
    "report": Command("perf.report", "the standard work measured, as a page with plots"),
    "bars": Command("perf.bars", "all that a release promises, measured, as one table"),
}


def exit_code_of(error: Exception) -> int | None:
    """2 for what cannot be measured as asked, 1 for other failures, None for a bug."""
    # Only this package's errors and the system's are told in one line; errors of `models` become PerfError there.
    if isinstance(error, (PerfError, OSError)):
        return 2 if isinstance(error, ValueError) else 1
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(
        "python -m perf", __doc__, COMMANDS, arguments, exit_code_of=exit_code_of, extras="perf"
    )


if __name__ == "__main__":
    sys.exit(main())
