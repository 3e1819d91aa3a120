"""The table of commands: listed without being imported, exit codes, and one JSON document in the last line."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import pytest

from serving.__main__ import COMMANDS
from serving.commands import Command, main
from serving.errors import InstanceError, UsageError
from tests.serving.test_launcher import serving


def test_all_commands_are_listed_and_none_is_imported() -> None:
    code = """
import sys, serving.__main__
from serving.commands import main
try:
    main("", serving.__main__.COMMANDS, ["--help"])
finally:
    loaded = [name for name in sys.modules if name.startswith("serving.") and name.count(".") > 1]
    print(loaded, "numpy" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[] False"
    for name, command in COMMANDS.items():
        assert f"{name} " in done.stdout
        assert command.summary.split(",")[0] in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    done = serving(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python -m serving {name}" in done.stdout


def test_backends_are_named_without_a_server() -> None:
    told = json.loads(serving("backends").stdout)
    assert {"python", "onnxruntime", "pytorch", "openvino"} <= set(told["backends"])


class Failing:
    """A module with a command that ends in `outcome`."""

    outcome: Any = None

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """No options."""

    @classmethod
    def run(cls, _options: argparse.Namespace) -> Any:
        """As `outcome` says."""
        if isinstance(cls.outcome, BaseException):
            raise cls.outcome
        return dict(cls.outcome) if isinstance(cls.outcome, dict) else cls.outcome


@pytest.mark.parametrize(
    ("outcome", "code", "out", "err"),
    [
        ({"a": 1}, 0, '{"a":1}\n', ""),
        ({"a": 1, "exit_code": 3}, 3, '{"a":1}\n', ""),
        (4, 4, "", ""),
        (UsageError("not both."), 2, "", "error: not both.\n"),
        (InstanceError("is up."), 1, "", "error: is up.\n"),
        (OSError("disk full"), 1, "", "error: disk full\n"),
        (KeyboardInterrupt(), 130, "", ""),
    ],
)
def test_outcomes_become_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcome: Any,
    code: int,
    out: str,
    err: str,
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setitem(sys.modules, "a_command", Failing)  # type: ignore[arg-type]
    monkeypatch.setattr(Failing, "outcome", outcome)
    assert main("", {"try": Command("a_command", "tries")}, ["try"]) == code
    assert capsys.readouterr() == (out, err)
