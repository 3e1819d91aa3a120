"""training/tiles.py"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from slides.decode import decode_tile
from slides.demo import make_demo_slides
from slides.labels import read_labels
from slides.spec import ModelSpec
from training import tiles
from training.errors import DataError
from training.recipe import Recipe


def collect(directory: Path, plan: Recipe) -> list[tiles.SlideTiles]:
    records = read_labels(directory, class_names=plan.spec.class_names)
    return tiles.collect_tiles(records, "tiles", plan.spec, show_progress=False)


def test_a_dataset_shows_what_the_server_decodes(tile_dir: Path, plan: Recipe) -> None:
    slides = collect(tile_dir, plan)
    dataset = tiles.TileDataset(slides, plan.spec)
    assert len(dataset) == 34
    tile, label, index = dataset[21]
    expected = decode_tile((tile_dir / "train" / "p10_1.jpg").read_bytes(), 32)
    assert np.array_equal(tile.numpy(), expected)
    assert (label, index, dataset.slide_of_item[21]) == (0, 21, "p10_1")


def test_slides_are_cut_where_tissue_is(tmp_path: Path) -> None:
    spec = ModelSpec(
        class_names=("CE", "LAA"),
        tile_size_px=256,
        um_per_px=0.5,
        input_size_px=64,
        tiles_per_slide=3,
        min_tissue_share=0.3,
    )
    size_px = (2048, 1536)
    make_demo_slides(tmp_path / "demo", slides=4, patients=4, centers=2, seed=3, size_px=size_px, workers=1)
    records = read_labels(tmp_path / "demo", class_names=spec.class_names)
    slides = tiles.collect_tiles(records, "slides", spec, show_progress=False)
    assert [slide.record for slide in slides] == records
    for slide in slides:
        assert 1 <= len(slide.tiles) <= 3
        assert all(decode_tile(tile, 64).mean() < 235 for tile in slide.tiles), "a tile of empty glass"
    records[1].path.write_bytes(b"")
    records[3].path.write_bytes(records[2].path.read_bytes()[:1000])
    with pytest.raises(DataError) as caught:
        tiles.collect_tiles(records, "slides", spec, show_progress=False)
    named = [problem.split(":")[0] for problem in caught.value.problems]
    assert named == [records[1].image_id, records[3].image_id]


def test_every_bad_tile_is_named(tile_dir: Path, plan: Recipe, tmp_path: Path) -> None:
    directory = shutil.copytree(tile_dir, tmp_path / "data")
    (directory / "train" / "p03_0.jpg").write_bytes(b"")
    whole = (directory / "train" / "p05_1.jpg").read_bytes()
    (directory / "train" / "p05_1.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"2 of 34 slides") as caught:
        collect(directory, plan)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["p03_0", "p05_1"]


def test_fingerprint_follows_content_not_order(tile_dir: Path, plan: Recipe) -> None:
    slides = collect(tile_dir, plan)
    original = tiles.fingerprint(slides)
    assert tiles.fingerprint(slides[::-1]) == original
    other_label = dataclasses.replace(slides[0], record=dataclasses.replace(slides[0].record, label="LAA"))
    other_byte = dataclasses.replace(slides[0], tiles=(slides[0].tiles[0] + b"\0",))
    told = {tiles.fingerprint([changed, *slides[1:]]) for changed in (other_label, other_byte)}
    told |= {tiles.fingerprint(slides[1:]), original}
    assert len(told) == 4


def test_augmentation_depends_on_seed_epoch_and_tile_alone(tile_dir: Path, plan: Recipe) -> None:
    slides = collect(tile_dir, plan)
    one, two = (tiles.TileDataset(slides, plan.spec, colour_jitter=0.2, seed=4) for _ in range(2))
    two[7]
    assert np.array_equal(one[3][0], two[3][0])
    two.set_epoch(1)
    assert not np.array_equal(one[3][0], two[3][0])


def test_augmentation_without_jitter_is_a_symmetry_of_the_square() -> None:
    tile_HWC = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    before = tile_HWC.copy()
    turned = [np.rot90(flip, k).tobytes() for flip in (tile_HWC, tile_HWC[:, ::-1]) for k in range(4)]
    seen = {tiles.augment(tile_HWC, 0.0, np.random.default_rng(seed)).tobytes() for seed in range(100)}
    assert seen == set(turned)
    assert np.array_equal(tile_HWC, before)


def test_jitter_stays_in_its_bounds() -> None:
    grey_HWC = np.full((8, 8, 3), 155, np.uint8)
    for seed in range(50):
        tile_HWC = tiles.augment(grey_HWC, 0.1, np.random.default_rng(seed))
        assert tile_HWC.dtype == np.uint8
        assert tile_HWC.flags.c_contiguous
        assert np.abs(tile_HWC.astype(int) - 155).max() <= 0.1 * 100 + 0.1 * 255 + 1
