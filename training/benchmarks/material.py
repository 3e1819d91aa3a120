"""What benchmarks of training work on: made-up tiles, recipes as files, training started as its users start it."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slides.decode import encode_tile
from slides.spec import ModelSpec
from training import recipe

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
CLASS_NAMES = ("CE", "LAA")


def make_tiles(directory: Path, *, patients: int, tiles_a_patient: int, side_px: int, seed: int = 0) -> Path:
    """A data folder of ready-cut JPEG tiles under noise: every third patient is CE (reddish), the others LAA (bluish)."""
    (directory / "train").mkdir(parents=True)
    generator = np.random.default_rng(seed)
    with (directory / "train.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("image_id", "center_id", "patient_id", "image_num", "label"))
        for patient in range(patients):
            label, colour = ("CE", (190, 120, 140)) if patient % 3 == 0 else ("LAA", (140, 120, 190))
            for number in range(tiles_a_patient):
                coarse_HWC = generator.normal(colour, 40, (-(-side_px // 8), -(-side_px // 8), 3))
                tile_HWC = np.kron(coarse_HWC, np.ones((8, 8, 1)))[:side_px, :side_px]
                tile_HWC = tile_HWC + generator.normal(0, 12, tile_HWC.shape)
                data = encode_tile(np.clip(tile_HWC, 0, 255).astype(np.uint8), 90)
                image_id = f"p{patient:03d}_{number}"
                (directory / "train" / f"{image_id}.jpg").write_bytes(data)
                writer.writerow((image_id, patient % 4, f"p{patient:03d}", number, label))
    return directory


def make_recipe(*, side_px: int, **values: Any) -> recipe.Recipe:
    """A recipe for tiles of `make_tiles`."""
    spec = ModelSpec(
        class_names=CLASS_NAMES,
        tile_size_px=side_px,
        um_per_px=0.5,
        input_size_px=side_px,
        tiles_per_slide=1,
        min_tissue_share=0.0,
    )
    usual: dict[str, Any] = {"source": "tiles", "learning_rate": 1e-3, "folds": 3, "seed": 11}
    return recipe.Recipe(**{**usual, **values, "spec": spec})


def write_recipe(plan: recipe.Recipe, path: Path) -> Path:
    """`plan` as a TOML file; JSON's scalars and lists are TOML's."""
    tables: dict[str, Mapping[str, Any]] = {"": {}}
    for key, value in plan.as_dict().items():
        if isinstance(value, Mapping):
            tables[key] = value
        else:
            tables[""] = {**tables[""], key: value}
    parts = [
        (f"[{name}]\n" if name else "")
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        for name, table in tables.items()
    ]
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def training_command(processes: int, *arguments: str | Path) -> list[str]:
    """training/train.py through `accelerate launch`, on the CPU, without tracking."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_machines", "1"]
    if processes > 1:
        launch += ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
    else:
        launch += ["--num_processes", "1"]
    return [*launch, str(TRAIN), *map(str, arguments), "--track", "none"]


def quiet_environment(**more: str) -> dict[str, str]:
    """This process's environment for children that measure: no GPU, no spinning threads."""
    return {**os.environ, "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": "", **more}
