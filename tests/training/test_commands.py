from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from training import __main__ as training_main
from training.benchmarks import __main__ as benchmarks_main
from training.commands import Command, main
from training.errors import CheckpointError, DataError


def run_with(answer: object, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    module = types.ModuleType("made_up_command")
    module.__doc__ = "Does as it is told."

    def run(options: object) -> object:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    module.add_arguments = lambda parser: parser.add_argument("--x")  # type: ignore[attr-defined]
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up_command", module)
    commands = {"do": Command("made_up_command", "does"), "other": Command("does.not.exist", "is not loaded")}
    return main("program", "What it is.", commands, ["do", *arguments])


def test_the_last_line_is_compact_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {"a": 1, "b": [0.5, float("nan")], "ü": {"c": float("inf")}}
    assert run_with(answer, monkeypatch) == 0
    assert capsys.readouterr().out == '{"a":1,"b":[0.5,null],"ü":{"c":null}}\n'
    assert run_with({"a": 1, "exit_code": 1}, monkeypatch) == 1
    assert json.loads(capsys.readouterr().out) == {"a": 1}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("data", ["is bad"]), 2, "error: data: 1 problem"),
        (CheckpointError("is damaged"), 1, "error: is damaged"),
        (FileNotFoundError(2, "No such file", "x"), 1, "error: [Errno 2]"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_lines_and_exit_codes(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_with(error, monkeypatch) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.out == ""


@pytest.mark.parametrize("module", ["training", "training.benchmarks"])
def test_help_lists_everything_and_loads_nothing_heavy(module: str) -> None:
    code = (
        "import runpy, sys\nsys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('{module}', run_name='__main__')\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'pyarrow', 'sklearn', 'mlflow', 'cv2'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = training_main.COMMANDS if module == "training" else benchmarks_main.BENCHMARKS
    assert all(name in done.stdout for name in table)


def test_a_library_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wants_more.py").write_text("import some_library_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    assert main("program", None, {"do": Command("wants_more", "does")}, ["do"]) == 1
    assert "do needs some_library_that_nobody_has: pip install" in capsys.readouterr().err


def test_wrong_usage() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "training", "nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "invalid choice: 'nonsense'" in done.stderr
