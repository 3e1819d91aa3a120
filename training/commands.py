"""A table of commands: each one a module that is imported only when its command is asked for.

A command's module has `add_arguments(parser) -> None` and `run(options) -> dict`. What `run` returns is printed as the
last line of stdout, one compact JSON document; its entry "exit_code", where there is one, becomes the exit code.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from slides.errors import SlidesError
from training.errors import OutputExistsError, TrainingError


class Command(NamedTuple):
    """Where a command lives, and the line that the list of commands shows for it."""

    module: str
    summary: str


def exit_code_of(error: Exception) -> int | None:
    """Exit code of an error that is told in one line: 2 wrong usage or input, 1 other failures; None of a bug."""
    if isinstance(error, (TrainingError, SlidesError, OSError)):
        return 2 if isinstance(error, (ValueError, OutputExistsError, SlidesError)) else 1
    return None


def main(
    program: str,
    description: str | None,
    commands: Mapping[str, Command],
    arguments: Sequence[str] | None = None,
    *,
    exit_code_of: Callable[[Exception], int | None] = exit_code_of,
    extras: str = "train,track",
) -> int:
    """Run one of `commands`; returns the exit code: 0 done, 2 wrong usage or input, 1 other failures, 130 interrupted.

    Args:
        exit_code_of: of an error that `run` raised; None lets it through with its traceback.
        extras: of the distribution, which bring all that the commands import.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listing = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    asked = next((word for word in words if not word.startswith("-")), None)
    for name, command in commands.items():
        if name != asked:  # its module stays unloaded: torch alone takes seconds
            listing.add_parser(name, help=command.summary)
            continue
        try:
            module = importlib.import_module(command.module)
        except ModuleNotFoundError as error:
            ours = ("training", "slides", command.module.partition(".")[0])
            if (error.name or "").partition(".")[0] in ours:
                raise
            print(f"error: {name} needs {error.name}: pip install 'clotline[{extras}]'", file=sys.stderr)
            return 1
        own = listing.add_parser(
            name,
            help=command.summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(own)
        own.set_defaults(run=module.run)
    options = parser.parse_args(words)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(143)
        )  # what is half-written is removed on the way out
    try:
        answer: dict[str, Any] = options.run(options)
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print("interrupted; nothing is left half-written", file=sys.stderr)
        return 130
    exit_code = int(answer.pop("exit_code", 0))
    try:
        print(
            json.dumps(_finite(answer), separators=(",", ":"), ensure_ascii=False, allow_nan=False),
            flush=True,
        )
    except BrokenPipeError:  # the reader has gone; what was asked for is done all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return exit_code


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
