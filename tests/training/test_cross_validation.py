"""training/cross_validation.py, with real trainings"""

from __future__ import annotations

import csv
import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slides.labels import read_labels
from training import checkpoint, cross_validation
from training.__main__ import COMMANDS
from training.commands import main
from training.folds import Folds, make_folds
from training.recipe import Recipe
from training.scores import all_scores

from .conftest import as_toml

ROOT = Path(__file__).resolve().parents[2]


def arguments(out: Path, data: Path, recipe_file: Path, *more: object) -> list[str]:
    words = (
        "cross-validate",
        "--recipe",
        recipe_file,
        "--data",
        data,
        "--out",
        out,
        "--track",
        "none",
        *more,
    )
    return [str(word) for word in words]


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "training", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def short(plan: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch, two folds."""
    path = tmp_path_factory.mktemp("recipe") / "short.toml"
    path.write_text(as_toml({**plan.as_dict(), "epochs": 1, "folds": 2}))
    return path


@pytest.fixture(scope="module")
def run(tile_dir: Path, short: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole cross-validation that was interrupted by Ctrl-C in its second fold, and its report."""
    out = tmp_path_factory.mktemp("cross validation") / "cv"
    process = start(arguments(out, tile_dir, short))
    deadline = time.monotonic() + 120
    while not (out / "fold_1").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert (out / "fold_0" / "held_out.csv").exists()
    assert not (out / "oof.csv").exists()
    trained_at = (out / "fold_0" / "history.json").stat().st_mtime_ns
    process = start(arguments(out, tile_dir, short))
    answer, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert "fold 0: finished already" in told
    assert (out / "fold_0" / "history.json").stat().st_mtime_ns == trained_at
    return out, json.loads(answer.splitlines()[-1])


def test_every_slide_is_predicted_by_a_network_that_never_saw_its_patient(
    run: tuple[Path, dict[str, Any]], tile_dir: Path
) -> None:
    out, _ = run
    records = read_labels(tile_dir, class_names=("CE", "LAA"))
    folds = Folds.load(out / "folds.json")
    assert folds == make_folds(records, folds=2, seed=3)
    rows = list(csv.DictReader((out / "oof.csv").open()))
    assert sorted(row["image_id"] for row in rows) == sorted(record.image_id for record in records)
    for fold in range(2):
        manifest = checkpoint.read_manifest(out / f"fold_{fold}" / "checkpoint")
        held_out = {name for name, number in folds.fold_of_patient.items() if number == fold}
        assert set(manifest["data"]["held_out_patients"]) == held_out
        own = list(csv.DictReader((out / f"fold_{fold}" / "held_out.csv").open()))
        assert {row["patient_id"] for row in own} == held_out
        assert all(row in rows for row in own)


def test_scores_are_those_of_the_joined_table(run: tuple[Path, dict[str, Any]]) -> None:
    out, told = run
    rows = list(csv.DictReader((out / "oof.csv").open()))
    labels = [int(row["label"] == "LAA") for row in rows]
    values = np.array([(float(row["p_CE"]), float(row["p_LAA"])) for row in rows])
    fold_of = Folds.load(out / "folds.json").fold_of_patient
    expected = all_scores(labels, values, [fold_of[row["patient_id"]] for row in rows])
    assert {name: told["slide"][name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert [entry["patients"] for entry in told["of_fold"]] == [9, 8]
    low, high = told["intervals"]["patient"]["weighted_log_loss"]
    assert low <= told["patient"]["weighted_log_loss"] <= high
    assert json.loads((out / "scores.json").read_text()) == {
        key: value for key, value in told.items() if key != "wall_s"
    }


def test_its_table_is_a_member_of_an_ensemble(
    run: tuple[Path, dict[str, Any]], tile_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, told = run
    words = [
        "ensemble",
        "--oof",
        out / "oof.csv",
        "--labels",
        tile_dir / "train.csv",
        "--out",
        tmp_path / "e.json",
    ]
    assert main("", "", COMMANDS, [str(word) for word in words]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["patient"]["roc_auc"] == pytest.approx(told["patient"]["roc_auc_across_folds"])
    assert answer["patient"]["weighted_log_loss"] == pytest.approx(told["patient"]["weighted_log_loss"])


def test_a_folder_of_something_else_is_left_alone(
    run: tuple[Path, dict[str, Any]],
    tile_dir: Path,
    short: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, _ = run
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert main("", "", COMMANDS, arguments(out, tile_dir, short, "--set", "epochs=2")) == 2
    assert "holds a cross-validation with another recipe" in capsys.readouterr().err
    assert main("", "", COMMANDS, arguments(out, tile_dir, short, "--set", "held_out_fold=1")) == 2
    with (out / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main("", "", COMMANDS, arguments(out, tile_dir, short)) == 2
    assert "another cross-validation works in" in capsys.readouterr().err
    other = make_folds(read_labels(tile_dir, class_names=("CE", "LAA")), folds=2, seed=8)
    other.save(tmp_path / "folds.json")
    assert main("", "", COMMANDS, arguments(out, tile_dir, short, "--folds", tmp_path / "folds.json")) == 2
    assert "another folds" in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert before == after


def test_a_fold_that_cannot_be_trained_ends_it(
    tile_dir: Path,
    short: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The training is a process that fails at once: what matters here is what is made of it."""
    monkeypatch.setattr(
        cross_validation, "_command", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"]
    )
    assert main("", "", COMMANDS, arguments(tmp_path / "cv", tile_dir, short)) == 1
    assert "fold_0 failed with exit code 3" in capsys.readouterr().err
    assert not (tmp_path / "cv" / "oof.csv").exists()
    assert (tmp_path / "cv" / "folds.json").exists()
