"""The commands of `python -m serving`: each one a module that is imported only when its command is asked for.

A command's module has `add_arguments(parser) -> None` and `run(options) -> dict | int`. A dict is printed as the last
line of standard output, one compact JSON document; its entry "exit_code", where there is one, becomes the exit code.
An int is the exit code of a command that has printed its own line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

from serving.errors import ServingError
from slides.errors import SlidesError


class Command(NamedTuple):
    """Where a command lives, and the line that the list of commands shows for it."""

    module: str
    summary: str


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(
    description: str | None,
    commands: Mapping[str, Command],
    arguments: Sequence[str] | None = None,
    *,
    program: str = "python -m serving",
) -> int:
    """Run one of `commands`; returns the exit code: 0 done, 2 wrong usage or input, 1 other failures, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    listing = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    asked = next((word for word in words if not word.startswith("-")), None)
    for name, command in commands.items():
        if name != asked:
            listing.add_parser(name, help=command.summary)
            continue
        module = importlib.import_module(command.module)
        own = listing.add_parser(
            name,
            help=command.summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(own)
        own.set_defaults(run=module.run, words=words[words.index(name) + 1 :])
    options = parser.parse_args(words)
    signal.signal(signal.SIGTERM, _interrupt)  # what is half-written is removed on the way out
    try:
        answer: dict[str, Any] | int = options.run(options)
    except (
        ServingError,
        SlidesError,
        OSError,
    ) as error:  # OSError: .triton cannot be written, the disk is full
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, SlidesError) else int(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        return 130
    if isinstance(answer, int):
        return answer
    exit_code = int(answer.pop("exit_code", 0))
    print(json.dumps(answer, separators=(",", ":"), ensure_ascii=False), flush=True)
    return exit_code
