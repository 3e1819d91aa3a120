"""Command lines in prose and scripts, held against the parsers and Make targets that they name."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from unittest import mock

from tests.docs.markdown_pages import ROOT

PACKAGES = frozenset(path.parent.name for path in ROOT.glob("*/__init__.py"))
SEPARATORS = {"|", "||", "&", "&&", ";", ">", ">>", "2>", "<", "(", ")"}


def commands_in(text: str) -> Iterator[list[str]]:
    """Words of each simple command of a shell text: comments, prompts and optional brackets are taken away."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        try:
            words = shlex.split(line.removeprefix("$ ").strip(), comments=True)
        except ValueError:  # prose, or a document with an apostrophe
            continue
        command: list[str] = []
        for word in [*words, ";"]:
            if word in SEPARATORS or word.endswith(";"):
                command += [word.rstrip(";")] if word.rstrip(";") not in ("", *SEPARATORS) else []
                if command:
                    yield command
                command = []
            else:
                command.append(word.strip("[]"))


def our_program(command: Sequence[str]) -> tuple[str, list[str]] | None:
    """(`serving`, its arguments) of `python -m serving ...`; (`training/train.py`, ...) however it is launched."""
    for number, word in enumerate(command):
        if word == "training/train.py":
            return word, list(command[number + 1 :])
        is_python = re.fullmatch(r"(.*/)?python[\d.]*|\$\(PY\)|\$PY", word) is not None
        if is_python and command[number + 1 : number + 2] == ["-m"] and len(command) > number + 2:
            module = command[number + 2]
            return (module, list(command[number + 3 :])) if module.split(".")[0] in PACKAGES else None
    return None


class _Caught(BaseException):
    """Not an Exception: programs tell those in one line."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def _catch(parser: argparse.ArgumentParser, *_arguments: object, **_options: object) -> None:
    raise _Caught(parser)


@cache
def parser_of(program: str, words: tuple[str, ...]) -> argparse.ArgumentParser | None:
    """The parser that a program reads these words with; None if it takes no arguments."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with (
            mock.patch.object(argparse.ArgumentParser, "parse_args", _catch),
            mock.patch.object(sys, "argv", [program, *words]),
            mock.patch.object(sys, "path", [str(ROOT), *sys.path]),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
    except _Caught as caught:
        return caught.parser
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return None


def problems_of(program: str, arguments: Sequence[str]) -> list[str]:
    """What a command line names that its program does not know."""
    words = [word for word in arguments if word not in ("...", "\N{HORIZONTAL ELLIPSIS}")]
    if program.endswith(".py"):
        if not (ROOT / program).is_file():
            return [f"there is no {program}"]
    elif not _is_module(program):
        return [f"there is no module {program} that can be run"]
    first = next((word for word in words if not word.startswith("-")), None)
    parser = parser_of(program, (first,) if first else ())
    if parser is None:
        return [f"{program} reads no arguments, and is given {words}"] if words else []
    return _unknown(parser, words)


def _unknown(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    problems = []
    for number, word in enumerate(words):
        option, _, value = word.partition("=")
        if option.startswith("-") and not re.fullmatch(r"-|-?\d+.*", option):
            action = parser._option_string_actions.get(option)
            if action is None:
                problems.append(f"{parser.prog} has no option {option}")
                continue
            value = value or (words[number + 1] if number + 1 < len(words) else "")
            if action.choices and value and not _is_placeholder(value):
                problems += [] if value in map(str, action.choices) else [f"{parser.prog} {option} {value}"]
            continue
        below = _subparsers(parser)
        if below is not None:
            if word in below:
                return problems + _unknown(below[word], words[number + 1 :])
            problems += [] if _is_placeholder(word) else [f"{parser.prog} has no command {word}"]
            return problems
    return problems


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """All options of a parser and of the commands below it."""
    own = set(parser._option_string_actions)
    return own.union(*(options_of(below) for below in (_subparsers(parser) or {}).values()))


def commands_of(parser: argparse.ArgumentParser) -> list[str]:
    return list(_subparsers(parser) or ())


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser] | None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return None


def _is_placeholder(word: str) -> bool:
    return word.isupper() or word.startswith(("<", "$", "{"))


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][a-z0-9_-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def make_problems(arguments: Sequence[str]) -> list[str]:
    """Targets and variables after `make` that the Makefile does not have."""
    makefile = (ROOT / "Makefile").read_text()
    problems = []
    for word in arguments:
        name, assigned, _ = word.partition("=")
        if assigned:
            problems += [] if f"$({name})" in makefile else [f"the Makefile reads no variable {name}"]
        elif re.fullmatch(r"[a-z][a-z0-9_-]*", word) and word not in make_targets():
            problems.append(f"there is no make {word}")
    return problems


def problems_in(text: str) -> list[str]:
    """All that a shell text names of ours and that is not there."""
    problems = []
    for command in commands_in(text):
        if command[0] == "make":
            problems += make_problems(command[1:])
        elif (ours := our_program(command)) is not None:
            problems += problems_of(*ours)
    return problems


def exists(path: str) -> bool:
    return (ROOT / path).exists() or any(Path(ROOT).glob(path))
