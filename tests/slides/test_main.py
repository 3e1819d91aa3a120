from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from slides.__main__ import main


def test_demo_and_inspect_end_with_one_json_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "my slides"
    arguments = ["demo", "--out", str(data), "--slides", "2", "--patients", "2", "--centers", "1"]
    assert main([*arguments, "--size", "1500x1024", "--workers", "1"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["data"] == str(data)
    assert answer["bytes"] > 10_000
    slide = next((data / "train").iterdir())
    picture = tmp_path / "picture.png"
    assert main(["inspect", str(slide), "--out", str(picture), "--tiles", "3", "--side", "300"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["tiles"] == 3
    assert cv2.imread(str(picture)).shape == (205, 300, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my slides", "picture.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "missing.tif", "--out", "a.png"], "there is no such slide"),
        (["inspect", "missing.tif", "--out", "a.jpg"], "is a PNG"),
        (["inspect", "missing.tif", "--out", "a.png", "--min-tissue", "7"], "min_tissue_share"),
        (["inspect", "missing.tif", "--out", "a.png", "--side", "0"], "--side"),
        (["demo", "--out", "somewhere", "--slides", "1"], "slides >= patients"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written(
    demo_slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(demo_slide), "--out", str(tmp_path / "missing" / "a.png")]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["demo"], ["demo", "--out", "x", "--size", "big"], ["nonsense"]])
def test_wrong_usage_from_the_shell(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "slides", *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert "usage: python -m slides" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_both_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "slides", "--help"], capture_output=True, text=True, check=True
    )
    assert "demo" in done.stdout
    assert "inspect" in done.stdout
