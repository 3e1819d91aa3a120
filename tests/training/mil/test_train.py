"""training/train.py with a recipe that has [bags]"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training import train
from training.mil import checkpoint as slide_checkpoint
from training.mil.options import BagOptions

RECIPE = """
source = "slides"
architecture = "squeezenet1_1"
weights = "{weights}"
epochs = 2
batch_size = 2
learning_rate = 1e-3
folds = 3
seed = 3

[spec]
class_names = ["CE", "LAA"]
tile_size_px = 64
um_per_px = 0.5
input_size_px = 32
tiles_per_slide = 12
min_tissue_share = 0.3

[bags]
tiles = 5
attention_dim = 8
encoder = "{encoder}"
"""


def recipe_file(folder: Path, *, encoder: str = "trained", weights: str = "none") -> Path:
    path = folder / "bags.toml"
    path.write_text(RECIPE.format(encoder=encoder, weights=weights))
    return path


def check(out: Path) -> None:
    loaded = slide_checkpoint.load(out / "checkpoint")
    assert loaded.bags == BagOptions(tiles=5, attention_dim=8, encoder=loaded.bags.encoder)
    assert len(loaded.manifest["data"]["train_patients"]) == 4
    with (out / "held_out.csv").open() as stream:
        held_out = {row["image_id"]: float(row["p_LAA"]) for row in csv.DictReader(stream)}
    assert sorted(held_out) == sorted(loaded.manifest["data"]["held_out_slides"])
    for bag in loaded.golden_bags:
        assert bag.probabilities[1] == pytest.approx(held_out[bag.image_id], abs=1e-5)
        assert len(bag.tiles) == len(bag.x_px) == 5
    with (out / "attention.csv").open() as stream:
        tiles = list(csv.DictReader(stream))
    assert len(tiles) == 5 * len(held_out)


def test_end_to_end(slide_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--recipe", recipe_file(tmp_path), "--data", slide_dir, "--out", tmp_path / "out"]
    assert train.main([*map(str, arguments), "--track", "none"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"checkpoint", "slide_auc", "patient_auc"} <= told.keys()
    assert "tile_accuracy" not in told
    check(tmp_path / "out")


def test_frozen_encoder_in_two_processes(slide_dir: Path, weights_file: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, encoder="frozen", weights=str(weights_file))
    root = Path(__file__).resolve().parents[3]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, root / "training" / "train.py", "--recipe", recipe, "--data", slide_dir]
    done = subprocess.run(
        [*map(str, command), "--out", str(tmp_path / "out"), "--track", "none"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CLOTLINE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check(tmp_path / "out")
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 6
