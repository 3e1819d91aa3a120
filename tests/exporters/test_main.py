"""The command line: exit codes, the last line, and what a full disk or a Ctrl-C leaves behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporters.__main__ import main
from exporters.formats.torchscript import TorchScript
from exporters.publication import hold_repository

Snapshot = Callable[[Path], dict[str, str]]
ROOT = Path(__file__).resolve().parents[2]
WITHOUT_SERVER = ("--formats", "torchscript", "--without-server")


def start(*arguments: object, file_limit_bytes: int | None = None) -> subprocess.Popen[str]:
    def limit() -> None:
        if file_limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit_bytes, file_limit_bytes))

    return subprocess.Popen(
        [sys.executable, "-m", "exporters", "export", "--without-server", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=limit,
    )


@pytest.fixture
def served(tmp_path: Path, snapshot: Snapshot) -> tuple[Path, dict[str, str]]:
    """A repository with something in it, and how it looks."""
    repository = tmp_path / "my models"
    (repository / "tile_network_onnx/3").mkdir(parents=True)
    (repository / "tile_network_onnx/3/model.onnx").write_text("an earlier release")
    (repository / "of_someone_else/1").mkdir(parents=True)
    return repository, snapshot(repository)


def test_the_last_line_says_what_was_published(
    checkpoint_dir: Path, served: tuple[Path, dict[str, str]]
) -> None:
    process = start(checkpoint_dir, "--repository", served[0], "--formats", "torchscript", "--max-batch", 4)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("\n") == 1
    document = json.loads(out)
    assert document["version"] == 4
    assert document["models"] == ["tile_network_torchscript", "tile_preprocess", "tile_classifier"]
    measured = document["formats"]["torchscript"]
    assert measured["max_abs_diff"] <= 1e-4
    assert measured["batches"] == [1, 2, 4]
    assert measured["bytes"] == (served[0] / "tile_network_torchscript/4/model.pt").stat().st_size
    assert "Warning" not in err
    assert "torchscript: tile_classifier -> tile_network_torchscript version 4" in err


def test_a_full_disk_leaves_the_repository_as_it_was(
    checkpoint_dir: Path, served: tuple[Path, dict[str, str]], snapshot: Snapshot
) -> None:
    repository, before = served
    process = start(
        checkpoint_dir, "--repository", repository, "--formats", "torchscript", file_limit_bytes=1_000_000
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert out == ""
    assert "error: The model repository" in err
    assert "File too large" in err
    assert "Traceback" not in err
    assert snapshot(repository) == before


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_an_interrupt_leaves_the_repository_as_it_was(
    sent: signal.Signals,
    code: int,
    checkpoint_dir: Path,
    served: tuple[Path, dict[str, str]],
    snapshot: Snapshot,
) -> None:
    repository, before = served
    process = start(checkpoint_dir, "--repository", repository, "--formats", "onnx")
    deadline_s = time.monotonic() + 60
    while not list(repository.parent.glob(f".{repository.name}.*")):  # it has begun to stage
        assert time.monotonic() < deadline_s
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert snapshot(repository) == before


def test_an_interrupt_that_a_library_drops_still_stops_the_export(
    checkpoint_dir: Path,
    served: tuple[Path, dict[str, str]],
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    repository, before = served

    class Interrupted:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    build = TorchScript.build

    def build_interrupted(self: TorchScript, *arguments: Any) -> bytes:
        interrupted = Interrupted()
        del interrupted
        return build(self, *arguments)

    monkeypatch.setattr(TorchScript, "build", build_interrupted)
    code = main(["export", str(checkpoint_dir), "--repository", str(repository), *WITHOUT_SERVER])
    assert code == 130
    assert "Traceback" not in capfd.readouterr().err
    assert snapshot(repository) == before


def test_bad_usage_and_bad_input_exit_with_2(
    checkpoint_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "models"

    def run(checkpoint: Path, *more: str) -> tuple[int, str]:
        code = main(["export", str(checkpoint), "--repository", str(repository), *more])
        captured = capsys.readouterr()
        assert captured.out == ""
        return code, captured.err

    bad = Path(shutil.copytree(checkpoint_dir, tmp_path / "bad"))
    manifest = json.loads((bad / "checkpoint.json").read_text())
    (bad / "checkpoint.json").write_text(json.dumps(manifest | {"golden_tiles": []}))
    for code, err in (
        run(checkpoint_dir, "--formats", "onnx,coreml"),
        run(checkpoint_dir, "--formats", ""),
        run(checkpoint_dir, "--max-batch", "0"),
        run(checkpoint_dir, "--instance-kind", "tpu"),
        run(tmp_path / "missing"),
        run(checkpoint_dir, "--tiles", str(tmp_path)),
        run(bad),
    ):
        assert code == 2, err
        assert "error: " in err
    assert not repository.exists()


def test_a_repository_that_cannot_be_used_exits_with_1(
    checkpoint_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert main(["export", str(checkpoint_dir), "--repository", str(file)]) == 1
    assert "is not a directory" in capsys.readouterr().err
    with hold_repository(tmp_path):
        assert main(["export", str(checkpoint_dir), "--repository", str(tmp_path)]) == 1
    assert "Another export is writing" in capsys.readouterr().err
