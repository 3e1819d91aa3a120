"""A small set of ready-cut tiles that is learnt in seconds, and the recipe for it."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from slides.decode import encode_tile
from slides.labels import read_labels
from slides.spec import ModelSpec
from training import recipe
from training.task import Split
from training.tile_task import TileTask


@pytest.fixture(autouse=True)
def _a_fresh_accelerator() -> Iterator[None]:
    """Accelerate holds what the first Accelerator of a process was told."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tile_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 patients with 2 tiles each: reddish CE, bluish LAA. Do not change it; copy it."""
    directory = tmp_path_factory.mktemp("tile set") / "data"
    (directory / "train").mkdir(parents=True)
    generator = np.random.default_rng(5)
    with (directory / "train.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("image_id", "center_id", "patient_id", "image_num", "label"))
        for patient in range(17):
            label, stain = (("CE", (205, 110, 130)), ("LAA", (130, 110, 205)))[patient % 2]
            for number in range(2):
                tile_HWC = np.clip(np.array(stain) + generator.normal(0, 35, (48, 48, 3)), 0, 255)
                data = encode_tile(tile_HWC.astype(np.uint8), 90)
                (directory / "train" / f"p{patient:02d}_{number}.jpg").write_bytes(data)
                writer.writerow((f"p{patient:02d}_{number}", patient % 3, f"p{patient:02d}", number, label))
    return directory


@pytest.fixture(scope="session")
def plan() -> recipe.Recipe:
    """Three epochs of a ResNet-18 on 32 px."""
    return recipe.Recipe(
        source="tiles",
        spec=ModelSpec(
            class_names=("CE", "LAA"),
            tile_size_px=48,
            um_per_px=0.5,
            input_size_px=32,
            tiles_per_slide=1,
            min_tissue_share=0.0,
        ),
        architecture="resnet18",
        epochs=3,
        batch_size=8,
        learning_rate=1e-3,
        folds=3,
        seed=3,
    )


def split_of(data: Path, plan: recipe.Recipe) -> Split:
    """As training/train.py splits: a fold held out, and validation patients where the recipe asks for some."""
    from training.train import _split

    return _split(plan, None, read_labels(data, class_names=plan.spec.class_names), ())


@pytest.fixture
def make_task(tile_dir: Path) -> Callable[[recipe.Recipe], TileTask]:
    """The tiles of `tile_dir` as a task of a recipe."""
    return lambda plan: TileTask.load(plan, tile_dir, split_of(tile_dir, plan))


def as_toml(values: dict[str, Any]) -> str:
    """Recipe values as TOML; JSON's scalars and lists are TOML's."""
    import json

    flat = [f"{key} = {json.dumps(value)}" for key, value in values.items() if key != "spec"]
    spec = [f"{key} = {json.dumps(value)}" for key, value in values.get("spec", {}).items()]
    return "\n".join([*flat, "[spec]", *spec]) + "\n"


@pytest.fixture
def recipe_file(plan: recipe.Recipe, tmp_path: Path) -> Path:
    """`plan` as a file."""
    path = tmp_path / "small.toml"
    path.write_text(as_toml(plan.as_dict()))
    return path
