"""training/train.py as its users start it."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from slides.decode import decode_tile
from slides.labels import read_labels
from tests.training.conftest import as_toml
from training import checkpoint, resume, train
from training.benchmarks import material
from training.benchmarks import resume as resume_benchmark
from training.errors import CheckpointError, DataError, OutputExistsError, RecipeError
from training.folds import make_folds, split_by_patient
from training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_machines", "1")
# With --cpu the launcher starts a single process, whatever --num_processes says.
TWO_PROCESSES = (*LAUNCH, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


def write_recipe(plan: Recipe, path: Path) -> Path:
    path.write_text(as_toml(plan.as_dict()))
    return path


def start(*arguments: str | Path, launch: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen[str]:
    """From another directory and without PYTHONPATH: the entry point finds its own package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(
        [*launch, str(ROOT / "training" / "train.py"), *map(str, arguments), "--track", "none"],
        cwd=ROOT.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    *arguments: str | Path, launch: tuple[str, ...] = (sys.executable,)
) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, launch=launch)
    out, err = process.communicate(timeout=150)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def probabilities_of(directory: Path, data: Path, image_ids: list[str]) -> np.ndarray:
    loaded = checkpoint.load(directory)
    paths = [data / "train" / f"{image_id}.jpg" for image_id in image_ids]
    tiles = [decode_tile(path.read_bytes(), loaded.spec.input_size_px) for path in paths]
    with torch.inference_mode():
        return loaded.model(torch.from_numpy(np.stack(tiles))).softmax(1).numpy()


@pytest.fixture(scope="module")
def runs(tile_dir: Path, plan: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run by `accelerate launch`, with one process; do not change it."""
    from_file = write_recipe(plan, tmp_path_factory.mktemp("recipe") / "small.toml")
    out_dir = tmp_path_factory.mktemp("a run") / "out"
    done = run(
        "--recipe", from_file, "--data", tile_dir, "--out", out_dir, launch=(*LAUNCH, "--num_processes", "1")
    )
    assert done.returncode == 0, done.stderr
    (out_dir / "stdout.txt").write_text(done.stdout)
    (out_dir / "stderr.txt").write_text(done.stderr)
    return out_dir


def test_report_and_files(runs: Path, tile_dir: Path) -> None:
    lines = (runs / "stdout.txt").read_text().splitlines()
    report = json.loads(lines[-1])
    assert Path(report["checkpoint"]) == runs / "checkpoint"
    assert report["tile_accuracy"] == report["patient_auc"] == 1.0
    assert (report["slides"], report["patients"], report["tiles"]) == (34, 17, 34)
    assert report["wall_s"] > 0
    assert [entry["epoch"] for entry in json.loads((runs / "history.json").read_text())] == [1, 2, 3]
    progress = (runs / "stderr.txt").read_text()
    assert all(f"epoch {epoch}/3: 100%" in progress for epoch in (1, 2, 3))
    manifest = checkpoint.read_manifest(runs / "checkpoint")
    assert manifest["recipe"]["epochs"] == 3
    assert set(manifest["versions"]) >= {"python", "torch", "torchvision", "accelerate"}
    assert len(manifest["git_commit"]) >= 7


def test_held_out_table_is_what_the_checkpoint_answers(runs: Path, tile_dir: Path, plan: Recipe) -> None:
    rows = list(csv.DictReader((runs / "held_out.csv").open()))
    _, held_out = split_by_patient(
        read_labels(tile_dir, class_names=plan.spec.class_names), folds=3, held_out_fold=0, seed=plan.seed
    )
    assert [row["image_id"] for row in rows] == [record.image_id for record in held_out]
    told = np.array([[float(row["p_CE"]), float(row["p_LAA"])] for row in rows])
    expected = probabilities_of(runs / "checkpoint", tile_dir, [row["image_id"] for row in rows])
    assert np.abs(told - expected).max() < 1e-6
    manifest = checkpoint.read_manifest(runs / "checkpoint")
    assert manifest["data"]["held_out_patients"] == sorted({row["patient_id"] for row in rows})


def test_golden_tiles_are_held_out_tiles_of_every_class(runs: Path, tile_dir: Path) -> None:
    loaded = checkpoint.load(runs / "checkpoint")
    held_out = set(loaded.manifest["data"]["held_out_slides"])
    labels = [tile.label for tile in loaded.golden_tiles]
    assert len(labels) == len(held_out) == len({tile.image_id for tile in loaded.golden_tiles})
    assert min(labels.count("CE"), labels.count("LAA")) >= 4
    for tile in loaded.golden_tiles:
        assert tile.image_id in held_out
        assert tile.data == (tile_dir / "train" / f"{tile.image_id}.jpg").read_bytes()


TWO = {
    "architecture": "mobilenet_v3_small",
    "gradient_accumulation_steps": 2,
    "mixed_precision": "bf16",
    "workers": 1,
    "batch_size": 4,
    "epochs": 5,
    "ema_decay": 0.8,
    "save_every_s": 0.0,
}


@pytest.fixture(scope="module")
def two(tile_dir: Path, plan: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run with two processes that nobody interrupts: OUT, with recipe.toml and stderr.txt in it."""
    folder = tmp_path_factory.mktemp("two processes")
    file = write_recipe(plan.model_copy(update=TWO), folder / "recipe.toml")
    done = run(*("--recipe", file, "--data", tile_dir, "--out", folder / "out"), launch=TWO_PROCESSES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line[0] for line in done.stdout.splitlines()] == ["{"], "only the main process reports"
    shutil.copy(file, folder / "out" / "recipe.toml")
    (folder / "out" / "stderr.txt").write_text(done.stderr)
    return folder / "out"


def test_two_processes_with_accumulation_in_bf16(two: Path, tile_dir: Path) -> None:
    assert (two / "stderr.txt").read_text().count("epoch 1 of 5: ") == 1, "only the main process tells"
    history = json.loads((two / "history.json").read_text())
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    rows = list(csv.DictReader((two / "held_out.csv").open()))
    assert len(rows) == len({row["image_id"] for row in rows}), "a tile was counted twice"
    expected = probabilities_of(two / "checkpoint", tile_dir, [row["image_id"] for row in rows])
    told = np.array([[float(row["p_CE"]), float(row["p_LAA"])] for row in rows])
    assert np.abs(told - expected).max() < 1e-5, "scores are those of the FP32 network that was saved"
    assert not (two / "state").exists(), "the state goes when it is not needed any more"


def test_two_processes_that_were_killed_end_with_the_same_bits(
    two: Path, tile_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    arguments = ("--recipe", two / "recipe.toml", "--data", tile_dir, "--out", out)
    command = material.training_command(2, *arguments)
    resume_benchmark.kill_at(command, target=1.4, epochs=5, delay_s=0.05)
    assert resume.has_saved(out / "state")
    assert not (out / "checkpoint").exists()
    said = resume_benchmark.finish(command)
    assert "going on in epoch " in said
    whole, resumed = resume_benchmark.weights(two), resume_benchmark.weights(out)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert (out / "held_out.csv").read_bytes() == (two / "held_out.csv").read_bytes()


def test_an_error_in_two_processes_ends_both(recipe_file: Path, tile_dir: Path, tmp_path: Path) -> None:
    data = shutil.copytree(tile_dir, tmp_path / "data")
    (data / "train" / "p04_1.jpg").write_bytes(b"torn")
    done = run(
        *("--recipe", recipe_file, "--data", data, "--out", tmp_path / "out"),
        launch=TWO_PROCESSES,
    )
    assert done.returncode != 0
    assert done.stderr.count("error: 1 of 34 slides cannot be used: 1 problem\n  - p04_1: ") == 1
    assert not (tmp_path / "out").exists()


@dataclasses.dataclass
class Told:
    code: int
    out: str
    err: str


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture[str]) -> Callable[..., Told]:
    """training/train.py without a process of its own, which takes seconds to start."""

    def called(*arguments: str | Path) -> Told:
        code = train.main([*map(str, arguments), "--track", "none"])
        captured = capsys.readouterr()
        return Told(code, captured.out, captured.err)

    return called


def check_refused(told: Told, code: int, *words: str) -> None:
    assert told.code == code, told.err
    assert told.out == ""
    assert told.err.startswith("error: ")
    for word in words:
        assert word in told.err


def test_unknown_recipe_keys(
    in_process: Callable[..., Told], recipe_file: Path, tile_dir: Path, tmp_path: Path
) -> None:
    recipe_file.write_text("learnrate = 1\nepoch = 3\n" + recipe_file.read_text())
    told = in_process("--recipe", recipe_file, "--data", tile_dir, "--out", tmp_path / "out")
    check_refused(told, 2, "2 problems", "learnrate: unknown key", "epoch: unknown key", str(recipe_file))
    assert not (tmp_path / "out").exists()


def test_labels_that_cannot_be_used(
    in_process: Callable[..., Told], recipe_file: Path, tmp_path: Path
) -> None:
    told = in_process("--recipe", recipe_file, "--data", tmp_path / "absent", "--out", tmp_path / "out")
    check_refused(told, 2, "train.csv")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_not_replaced_unasked(
    in_process: Callable[..., Told], runs: Path, recipe_file: Path, tile_dir: Path
) -> None:
    before = (runs / "checkpoint" / "checkpoint.json").read_bytes()
    told = in_process("--recipe", recipe_file, "--data", tile_dir, "--out", runs)
    check_refused(told, 2, "exists already", "--overwrite")
    assert (runs / "checkpoint" / "checkpoint.json").read_bytes() == before


def test_a_loss_that_is_no_number(
    in_process: Callable[..., Told], recipe_file: Path, tile_dir: Path, tmp_path: Path
) -> None:
    told = in_process(
        *("--recipe", recipe_file, "--data", tile_dir, "--out", tmp_path / "out"),
        *("--set", "learning_rate=1e30", "--set", "warmup_share=0.0"),
    )
    assert told.code == 1
    assert "\nerror: the loss became " in told.err
    assert not (tmp_path / "out").exists()


def test_the_manifest_says_who_was_learnt_from_and_folds_come_from_a_file(
    in_process: Callable[..., Told], recipe_file: Path, tile_dir: Path, tmp_path: Path, plan: Recipe
) -> None:
    records = read_labels(tile_dir, class_names=plan.spec.class_names)
    folds = make_folds(records, folds=4, seed=9)
    folds.save(tmp_path / "folds.json")
    told = in_process(
        *("--recipe", recipe_file, "--data", tile_dir, "--out", tmp_path / "out", "--set", "epochs=2"),
        *("--folds", tmp_path / "folds.json", "--held-out-fold", "3", "--set", "validation_share=0.34"),
        *("--set", "schedule=cyclic", "--set", "cycles=2", "--set", "warmup_share=0.0"),
    )
    assert told.code == 0, told.err
    report = json.loads(told.out.splitlines()[-1])
    manifest = checkpoint.read_manifest(report["checkpoint"])
    data = manifest["data"]
    expected = sorted(patient for patient, fold in folds.fold_of_patient.items() if fold == 3)
    assert data["held_out_patients"] == expected
    parts = [set(data[f"{part}_patients"]) for part in ("train", "validation", "held_out")]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 17
    assert data["source"] == "tiles"
    assert (manifest["recipe"]["epochs"], manifest["recipe"]["held_out_fold"]) == (2, 3)
    snapshots = sorted((tmp_path / "out" / "snapshots").iterdir())
    assert [path.name for path in snapshots] == ["1", "2"]
    tables = [(path / "held_out.csv").read_text() for path in snapshots]
    assert tables[1] == (tmp_path / "out" / "held_out.csv").read_text() != tables[0]
    assert checkpoint.load(snapshots[0]).manifest["snapshot"] == 1


def test_a_state_of_another_training_is_refused_until_restart(
    in_process: Callable[..., Told],
    recipe_file: Path,
    tile_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ("--recipe", recipe_file, "--data", tile_dir, "--out", tmp_path / "out")

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", full_disk)
        told = in_process(*arguments, "--set", "epochs=1")
    assert told.code == 1
    assert "no space left" in told.err
    assert resume.has_saved(tmp_path / "out" / "state"), "an hour's work is not lost to a full disk"
    other = in_process(*arguments, "--set", "epochs=2")
    check_refused(other, 2, "1 problem", "recipe.epochs was 1, is 2", "--restart")
    again = in_process(*arguments, "--set", "epochs=1", "--set", "save_every_s=7.0")
    assert again.code == 0, again.err
    assert "epoch 1/1" not in again.err, "the epoch that was saved is not trained again"
    assert not (tmp_path / "out" / "state").exists()
    anew = in_process(*arguments, "--set", "epochs=2", "--restart", "--overwrite")
    assert anew.code == 0, anew.err


def test_ctrl_c_leaves_nothing_but_a_state(recipe_file: Path, tile_dir: Path, tmp_path: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("epochs = 3", "epochs = 1000"))
    process = start("--recipe", recipe_file, "--data", tile_dir, "--out", tmp_path / "out")
    assert process.stderr is not None
    seen = ""
    while "epoch 2/1000" not in seen:
        piece = process.stderr.read(1)
        assert piece, seen
        seen += piece
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "interrupted; the same command goes on" in err
    assert "Traceback" not in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["state"]


@pytest.mark.parametrize("kind", [RecipeError, DataError])
def test_errors_travel_between_processes(kind: type[RecipeError]) -> None:
    import pickle

    error = pickle.loads(pickle.dumps(kind("here", ["one", "two"])))  # noqa: S301
    assert (error.source, error.problems) == ("here", ("one", "two"))
    assert str(error) == "here: 2 problems\n  - one\n  - two"
    assert not issubclass(kind, (CheckpointError, OutputExistsError))


def test_the_page_about_training_lists_every_key_of_a_recipe() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    listed = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert set(Recipe.model_fields) - {"spec", "bags"} <= listed
