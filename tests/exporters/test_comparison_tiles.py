"""Tiles for the gate and for calibration, from a tile store that `python -m training tile` cut."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from exporters.comparison_tiles import calibration_tiles, comparison_tiles
from exporters.errors import GoldenTilesError
from slides.decode import decode_tile
from slides.labels import read_labels
from training.checkpoint import Checkpoint
from training.store.reader import TileStore

SIZE_PX = 64


def run(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small slides of four patients."""
    data = tmp_path_factory.mktemp("slides") / "data"
    more = ("--slides", 4, "--patients", 4, "--centers", 1, "--size", "1536x1536", "--workers", 1)
    run("slides", "demo", "--out", data, *more)
    return data


@pytest.fixture(scope="module")
def store(slides: Path) -> Path:
    path = slides.parent / "a store"
    cut = ("--tile-size", SIZE_PX, "--um-per-px", 0.5, "--tiles-per-slide", "all", "--workers", 1)
    run("training", "tile", "--data", slides, "--out", path, "--class-names", "CE,LAA", *cut)
    return path


@pytest.fixture
def source(loaded: Checkpoint, slides: Path) -> Checkpoint:
    """A checkpoint that was trained on two of the patients and held two out."""
    patients = [record.patient_id for record in read_labels(slides, class_names=("CE", "LAA"))]
    spec = dataclasses.replace(
        loaded.spec, tile_size_px=SIZE_PX, um_per_px=0.5, tiles_per_slide=20, min_tissue_share=0.5
    )
    data = {"held_out_patients": patients[:2], "train_patients": patients[2:]}
    return dataclasses.replace(loaded, spec=spec, manifest={**loaded.manifest, "data": data})


def test_calibration_takes_training_patients_and_the_gate_takes_held_out_ones(
    source: Checkpoint, store: Path
) -> None:
    opened = TileStore.open(store)
    held_out, trained = (source.manifest["data"][key] for key in ("held_out_patients", "train_patients"))
    compared = comparison_tiles(source, store)
    assert set(compared.truth.patients_N) == set(held_out)
    assert len(compared.encoded) == len(compared.tiles_NHWC) == 32  # 16 a slide
    for tile, decoded_HWC in zip(compared.encoded, compared.tiles_NHWC, strict=True):
        np.testing.assert_array_equal(decode_tile(tile.data, SIZE_PX), decoded_HWC)

    images = {record.image_id for record in opened.slides if record.patient_id in trained}
    sent = {
        decode_tile(opened.tile(row), SIZE_PX).tobytes()
        for image_id in images
        for row in opened.richest(image_id, 20, 0.5)
    }
    calibrated_NHWC = calibration_tiles(source, store)
    assert calibrated_NHWC.shape == (32, SIZE_PX, SIZE_PX, 3)
    assert {tile.tobytes() for tile in calibrated_NHWC} <= sent
    assert not {tile.tobytes() for tile in calibrated_NHWC} & {t.tobytes() for t in compared.tiles_NHWC}


def test_a_store_that_was_cut_otherwise_is_refused(source: Checkpoint, store: Path) -> None:
    other = dataclasses.replace(source, spec=dataclasses.replace(source.spec, um_per_px=1.0))
    with pytest.raises(GoldenTilesError, match=r"um_per_px is 0\.5 in the store, 1\.0"):
        calibration_tiles(other, store)


def test_a_damaged_store_is_named_and_not_read_as_a_directory(
    source: Checkpoint, store: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(store, tmp_path / "store"))
    next(damaged.glob("slides/*.arrow")).unlink()
    with pytest.raises(GoldenTilesError, match=r"tile store .* cannot be used.*arrow"):
        comparison_tiles(source, damaged)


def test_whole_slides_are_to_be_cut_first(source: Checkpoint, slides: Path) -> None:
    with pytest.raises(GoldenTilesError, match="python -m training tile"):
        calibration_tiles(source, slides)


def test_patients_that_are_not_there_are_no_calibration(source: Checkpoint, store: Path) -> None:
    data = {**source.manifest["data"], "train_patients": ["somebody_else"]}
    other = dataclasses.replace(source, manifest={**source.manifest, "data": data})
    with pytest.raises(GoldenTilesError, match="no tile of the training patients"):
        calibration_tiles(other, store)
