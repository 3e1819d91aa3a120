"""python -m exporters preflight: exit codes, what it prints, and that it only reads."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from exporters.__main__ import main


def ask(*words: str | Path) -> int:
    return main(["preflight", *map(str, words)])


@pytest.mark.parametrize(
    ("tag", "strict", "code"),
    [
        ("26.07", False, 0),
        ("26.07", True, 0),
        ("27.01", False, 0),
        ("27.01", True, 1),
        ("26.07-py3-min", False, 1),
    ],
)
def test_exit_codes(
    repository: Any, capsys: pytest.CaptureFixture[str], tag: str, strict: bool, code: int
) -> None:
    repository.onnx("network")
    assert ask(repository.root, "--container", tag, *(["--strict"] if strict else [])) == code
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [model["model"] for model in document["models"]] == ["network"]
    assert "exit_code" not in document


@pytest.mark.parametrize("tag", ["newest", "26.07-nonsense"])
def test_wrong_usage_is_one_line(repository: Any, capsys: pytest.CaptureFixture[str], tag: str) -> None:
    repository.onnx("network")
    assert ask(repository.root, "--container", tag) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1


def test_nothing_to_look_at_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path / "nothing", "--container", "26.07") == 2
    assert ask(tmp_path, "--container", "26.07") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_it_only_reads(repository: Any) -> None:
    repository.onnx("network")
    repository.python("python")

    def seen() -> dict[str, str]:
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            for path in repository.root.rglob("*")
        }

    before = seen()
    ask(repository.root, "--container", "26.07")
    assert seen() == before


def test_torch_is_not_loaded() -> None:
    """An answer takes less than a second; torch alone takes longer."""
    code = (
        "import sys; from exporters.__main__ import main; "
        "main(['preflight', 'model_repository', '--container', '26.07']); print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
