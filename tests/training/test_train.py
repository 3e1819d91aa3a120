"""training/train.py as its users start it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from slides.decode import decode_tile
from slides.labels import read_labels
from training import checkpoint
from training.errors import CheckpointError, DataError, OutputExistsError, RecipeError
from training.recipe import Recipe
from training.split import split_by_patient

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--quiet")


def start(*arguments: str | Path, launch: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen[str]:
    """From another directory and without PYTHONPATH: the entry point finds its own package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(
        [*launch, str(ROOT / "training" / "train.py"), *map(str, arguments)],
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
    from_file = tmp_path_factory.mktemp("recipe") / "small.toml"
    spec = "\n".join(f"{key} = {json.dumps(value)}" for key, value in plan.spec.as_dict().items())
    rest = {key: value for key, value in plan.as_dict().items() if key != "spec"}
    from_file.write_text(
        "\n".join(f"{key} = {json.dumps(value)}" for key, value in rest.items()) + "\n[spec]\n" + spec
    )
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


def test_two_processes_with_accumulation_in_bf16(recipe_file: Path, tile_dir: Path, tmp_path: Path) -> None:
    text = recipe_file.read_text()
    text = text.replace("gradient_accumulation_steps = 1", "gradient_accumulation_steps = 2")
    text = text.replace('mixed_precision = "no"', 'mixed_precision = "bf16"').replace(
        "workers = 0", "workers = 1"
    )
    recipe_file.write_text(
        text.replace("batch_size = 8", "batch_size = 4").replace("epochs = 3", "epochs = 6")
    )
    out_dir = tmp_path / "two processes"
    done = run(
        *("--recipe", recipe_file, "--data", tile_dir, "--out", out_dir),
        launch=(*LAUNCH, "--num_processes", "2", "--cpu", "--main_process_port", "0"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    documents = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(documents) == 1, "only the main process reports"
    assert done.stderr.count("epoch 1/6: 100%") <= 2, "only the main process shows progress"
    history = json.loads((out_dir / "history.json").read_text())
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    rows = list(csv.DictReader((out_dir / "held_out.csv").open()))
    assert len(rows) == len({row["image_id"] for row in rows}), "a tile was counted twice"
    expected = probabilities_of(out_dir / "checkpoint", tile_dir, [row["image_id"] for row in rows])
    told = np.array([[float(row["p_CE"]), float(row["p_LAA"])] for row in rows])
    assert np.abs(told - expected).max() < 1e-5, "scores are those of the FP32 network that was saved"


def test_an_error_in_two_processes_ends_both(recipe_file: Path, tile_dir: Path, tmp_path: Path) -> None:
    data = shutil.copytree(tile_dir, tmp_path / "data")
    (data / "train" / "p04_1.jpg").write_bytes(b"torn")
    done = run(
        *("--recipe", recipe_file, "--data", data, "--out", tmp_path / "out"),
        launch=(*LAUNCH, "--num_processes", "2", "--cpu", "--main_process_port", "0"),
    )
    assert done.returncode != 0
    assert done.stderr.count("error: 1 of 34 slides cannot be used: 1 problem\n  - p04_1: ") == 1
    assert not (tmp_path / "out").exists()


def check_refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_unknown_recipe_keys(recipe_file: Path, tile_dir: Path, tmp_path: Path) -> None:
    recipe_file.write_text("learnrate = 1\nepoch = 3\n" + recipe_file.read_text())
    done = run("--recipe", recipe_file, "--data", tile_dir, "--out", tmp_path / "out")
    check_refused(done, 2, "2 problems", "learnrate: unknown key", "epoch: unknown key", str(recipe_file))
    assert not (tmp_path / "out").exists()


def test_labels_that_cannot_be_used(recipe_file: Path, tmp_path: Path) -> None:
    done = run("--recipe", recipe_file, "--data", tmp_path / "absent", "--out", tmp_path / "out")
    check_refused(done, 2, "train.csv")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_not_replaced_unasked(runs: Path, recipe_file: Path, tile_dir: Path) -> None:
    before = (runs / "checkpoint" / "checkpoint.json").read_bytes()
    done = run("--recipe", recipe_file, "--data", tile_dir, "--out", runs)
    check_refused(done, 2, "exists already", "--overwrite")
    assert (runs / "checkpoint" / "checkpoint.json").read_bytes() == before


def test_a_loss_that_is_no_number(recipe_file: Path, tile_dir: Path, tmp_path: Path) -> None:
    text = recipe_file.read_text().replace("learning_rate = 0.001", "learning_rate = 1e30")
    recipe_file.write_text(text.replace("warmup_share = 0.2", "warmup_share = 0.0"))
    done = run("--recipe", recipe_file, "--data", tile_dir, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "\nerror: the loss became " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_nothing(recipe_file: Path, tile_dir: Path, tmp_path: Path) -> None:
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
    assert "interrupted; nothing was written" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [RecipeError, DataError])
def test_errors_travel_between_processes(kind: type[RecipeError]) -> None:
    import pickle

    error = pickle.loads(pickle.dumps(kind("here", ["one", "two"])))  # noqa: S301
    assert (error.source, error.problems) == ("here", ("one", "two"))
    assert str(error) == "here: 2 problems\n  - one\n  - two"
    assert not issubclass(kind, (CheckpointError, OutputExistsError))
