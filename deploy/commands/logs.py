"""python -m deploy logs
python -m deploy logs gateway --follow

Prints the end of the logs of the stack, or of one part. `tritonserver` is the server's own log, `triton` that of what
supervises it; `access` is the gateway's access log.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections import deque
from pathlib import Path

from deploy.commands.state import add_state, state_of
from deploy.errors import UsageError
from deploy.local_report import logs

LOOK_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="one part: " + "triton, tritonserver, gateway, access, ..."
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C")
    parser.add_argument(
        "-n",
        "--lines",
        type=int,
        default=20,
        metavar="N",
        help="lines of each to begin with (default %(default)s)",
    )
    add_state(parser)


def run(options: argparse.Namespace) -> int:
    """Print them."""
    found = logs(state_of(options))
    if options.name:
        if options.name not in found:
            known = ", ".join(sorted(found)) or "none: no stack was up"
            raise UsageError(f"there is no log of {options.name!r}; there are: {known}.")
        found = {options.name: found[options.name]}
    width = max(map(len, found), default=0)
    places = {}
    for name, path in found.items():
        with contextlib.suppress(OSError), path.open(errors="replace") as file:
            for line in deque(file, maxlen=max(options.lines, 0)):
                _print(name, width, line)
            places[name] = file.tell()
    with contextlib.suppress(KeyboardInterrupt):
        while options.follow:
            for name, path in found.items():
                places[name] = _print_new(name, width, path, places.get(name, 0))
            time.sleep(LOOK_S)
    return 0


def _print_new(name: str, width: int, path: Path, place: int) -> int:
    """Print what was written since; returns where it ended. A log that became shorter was cut: it is read from its start."""
    try:
        with path.open(errors="replace") as file:
            file.seek(place if path.stat().st_size >= place else 0)
            for line in file:
                _print(name, width, line)
            return file.tell()
    except OSError:
        return place


def _print(name: str, width: int, line: str) -> None:
    sys.stdout.write(f"{name:{width}}  {line.rstrip()}\n")
    sys.stdout.flush()
