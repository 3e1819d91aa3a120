"""The table of all bars, with commands that only print what the real ones would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perf.__main__ import main
from perf.bars import MEASUREMENTS, Measurement, Row, measured, numbers, write_table


def echo(directory: Path, monkeypatch: pytest.MonkeyPatch, *lines: str, code: int = 0) -> Measurement:
    """A measurement whose command prints these lines."""
    text = "\n".join(f"print({line!r})" for line in lines)
    (directory / "echoing.py").write_text(f"import sys\n{text}\nsys.exit({code})\n")
    monkeypatch.setenv("PYTHONPATH", str(directory))
    monkeypatch.syspath_prepend(str(directory))
    return Measurement("7", "a promise", "echoing", lambda releases: ["--repository", "r"], (), ("wrong",))


@pytest.mark.parametrize("passed", [True, False])
def test_the_last_line_of_a_command_says_whether_its_bar_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: bool
) -> None:
    line = json.dumps({"wrong": 3, "passed": passed})
    row = measured(echo(tmp_path, monkeypatch, "noise", line, code=not passed), [], quick=False)
    assert row == Row("7", "a promise", "python -m echoing --repository r", "wrong 3", passed)


@pytest.mark.parametrize("lines", [(), ("no JSON",), ("[1]",)])
def test_a_command_that_fails_without_a_line_misses_its_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: tuple[str, ...]
) -> None:
    row = measured(echo(tmp_path, monkeypatch, *lines, code=1), [], quick=False)
    assert not row.passed
    assert "exit code 1" in row.figures


def test_an_interrupted_command_has_time_to_clean_up(tmp_path: Path) -> None:
    (tmp_path / "cleaning.py").write_text(
        "import pathlib, sys, time\n"
        "here = pathlib.Path(sys.argv[-1])\n"
        "try:\n    (here / 'begun').touch()\n    time.sleep(60)\n"
        "finally:\n    time.sleep(1)\n    (here / 'cleaned').touch()\n"
    )
    interrupted = (
        "from perf.bars import Measurement, measured\n"
        f"measured(Measurement('7', 'x', 'cleaning', lambda _: [{str(tmp_path)!r}], ()), [], quick=False)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(tmp_path)])}
    process = subprocess.Popen([sys.executable, "-c", interrupted], env=env, stderr=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 30
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
    finally:
        process.kill()
    assert (tmp_path / "cleaned").exists()


def test_a_command_that_is_not_there_misses_its_bar() -> None:
    row = measured(Measurement("6", "x", "no_such_package.inside bench", lambda _: [], ()), [], quick=True)
    assert not row.passed
    assert "not in this checkout" in row.figures


def test_every_command_knows_its_options() -> None:
    for measurement in MEASUREMENTS:
        assert measurement.module.split()[0] in ("serving.benchmarks", "deploy.benchmarks")
        package, command = measurement.module.split()
        __import__(f"{package}.__main__")
        module = sys.modules[f"{package}.__main__"].COMMANDS[command].module
        source = Path(f"{module.replace('.', '/')}.py").read_text()
        options = [word for word in measurement.quick if word.startswith("--")]
        assert options
        assert all(f'"{option}"' in source for option in options)


def test_the_table_names_bar_figures_and_command(tmp_path: Path) -> None:
    write_table(
        tmp_path, [Row("1", "fast", "python -m x", "ratio 0.97", True), Row("7", "safe", "y", "", False)]
    )
    text = (tmp_path / "bars.md").read_text()
    assert "| 1 | fast | ratio 0.97 | yes |" in text
    assert "| 7 | safe |  | **NO** |" in text
    assert [row["passed"] for row in json.loads((tmp_path / "bars.json").read_text())["bars"]] == [
        True,
        False,
    ]


def test_unknown_bars_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bars", "--out", str(tmp_path), "--only", "1,12"]) == 2
    assert ", ".join(numbers()) in capsys.readouterr().err
