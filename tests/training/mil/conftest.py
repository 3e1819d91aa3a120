"""Slides made of grey tiles; those of class LAA have one red tile somewhere. And recipes that learn them in seconds."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from slides.decode import encode_tile
from slides.labels import SlideRecord
from slides.spec import ModelSpec
from training import network, recipe
from training.folds import split_by_patient
from training.mil.bags import Places, SlideBag, of_tiles
from training.mil.task import BagTask
from training.task import Split
from training.tiles import SlideTiles

CLASS_NAMES = ("CE", "LAA")
SPEC = ModelSpec(
    class_names=CLASS_NAMES,
    tile_size_px=32,
    um_per_px=0.5,
    input_size_px=32,
    tiles_per_slide=6,
    min_tissue_share=0.0,
)


def red_row(bag: SlideBag) -> int:
    """Which tile of a slide made by `make_bags` is the red one, where its label is LAA."""
    return int(bag.record.patient_id[1:]) % len(bag.tiles)


def make_bags(patients: int, *, least_tiles: int = 2, most_tiles: int = 6) -> list[SlideBag]:
    """Two slides a patient, of different numbers of tiles."""
    generator = np.random.default_rng(11)
    bags = []
    for patient in range(patients):
        label = CLASS_NAMES[patient % 2]
        for number in range(2):
            count = int(generator.integers(least_tiles, most_tiles + 1))
            tiles = []
            for row in range(count):
                red = label == "LAA" and row == patient % count
                stain = (210, 60, 60) if red else (140, 140, 140)
                tile_HWC = np.clip(np.array(stain) + generator.normal(0, 20, (32, 32, 3)), 0, 255)
                tiles.append(encode_tile(tile_HWC.astype(np.uint8), 95))
            name = f"p{patient:02d}"
            record = SlideRecord(f"{name}_{number}", str(patient % 3), name, number, label, Path("none"))
            (bag,) = of_tiles([SlideTiles(record, tuple(tiles))])
            places = Places(np.arange(count) * 64, np.zeros(count, np.int64), np.full(count, 64))
            bags.append(SlideBag(record, bag.tiles, bag.darkness_T, places))
    return bags


@pytest.fixture(scope="session")
def slides() -> list[SlideBag]:
    """24 slides of 12 patients."""
    return make_bags(12)


@pytest.fixture(scope="session")
def slide_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six patients with one tiled TIFF each; tissue from (96, 96) to (544, 416), darker up to (224, 224)."""
    folder = tmp_path_factory.mktemp("slides") / "data"
    (folder / "train").mkdir(parents=True)
    generator = np.random.default_rng(3)
    with (folder / "train.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("image_id", "center_id", "patient_id", "image_num", "label"))
        for patient in range(6):
            slide_HWC = np.full((512, 640, 3), 245, np.uint8)
            stain = np.array(((190, 90, 120), (120, 70, 150))[patient % 2])
            slide_HWC[96:416, 96:544] = (stain + generator.normal(0, 12, (320, 448, 3))).clip(0, 255)
            slide_HWC[96:224, 96:224] = 0.75 * slide_HWC[96:224, 96:224]
            tifffile.imwrite(
                folder / "train" / f"s{patient}_0.tif",
                slide_HWC,
                tile=(128, 128),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 95},
                resolution=(20000, 20000),
                resolutionunit="CENTIMETER",
            )
            writer.writerow((f"s{patient}_0", "1", f"s{patient}", "0", CLASS_NAMES[patient % 2]))
    return folder


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a squeezenet1_1, for a frozen encoder: noise, but always the same."""
    import safetensors.torch

    torch.manual_seed(4)
    backbone = network.build("squeezenet1_1", SPEC).backbone
    path = tmp_path_factory.mktemp("weights") / "squeezenet.safetensors"
    safetensors.torch.save_file(
        {name: value.contiguous() for name, value in backbone.state_dict().items()}, path
    )
    return path


Plan = Callable[..., recipe.Recipe]


@pytest.fixture
def plan() -> Plan:
    """A recipe with [bags]; `bags` changes that table, other keywords the recipe."""

    def make(bags: dict[str, Any] | None = None, **changes: Any) -> recipe.Recipe:
        values: dict[str, Any] = {
            "source": "slides",
            "spec": SPEC.as_dict(),
            "architecture": "squeezenet1_1",
            "bags": {"tiles": 4, "attention_dim": 16, "embedding_dim": 16, **(bags or {})},
            "epochs": 1,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "folds": 3,
            "seed": 3,
        }
        return recipe.from_dict({**values, **changes})

    return make


MakeTask = Callable[[recipe.Recipe], BagTask]


@pytest.fixture
def make_task(slides: list[SlideBag], tmp_path: Path) -> MakeTask:
    """`slides` as a task of a recipe; embeddings are kept in tmp_path/"embeddings"."""

    def make(plan: recipe.Recipe) -> BagTask:
        records = [bag.record for bag in slides]
        train, held_out = split_by_patient(records, folds=plan.folds, held_out_fold=0, seed=plan.seed)
        split = Split(tuple(train), (), tuple(held_out))
        bag_of = {bag.record.image_id: bag for bag in slides}
        return BagTask(
            plan,
            split,
            [bag_of[record.image_id] for record in split.records],
            {"fingerprint": "f" * 64, "source": "slides"},
            embeddings_folder=tmp_path / "embeddings",
        )

    return make
