from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from slides.decode import decode_tile, encode_tile
from slides.reader import open_slide
from tests.training.store.conftest import CLASS_NAMES
from training.errors import StoreError
from training.store.reader import TileStore
from training.store.spec import StoreSpec
from training.store.stain import StainNormaliser
from training.store.writer import write_store


@pytest.fixture(scope="module")
def tiles(aperio: Path) -> list[NDArray[np.uint8]]:
    """Tiles of a real slide, each also as a scanner with a bluer lamp would have seen it."""
    with open_slide(aperio) as slide:
        return [slide.read_region_um(x, y, 192, 0.5) for x, y in ((1000, 1000), (1100, 1700), (700, 2600))]


def bluer(tile_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return (255 * (tile_HWC / 255) ** np.array((1.4, 1.0, 0.75))).astype(np.uint8)


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_two_scanners_come_closer(method: str, tiles: list[NDArray[np.uint8]]) -> None:
    normalise = StainNormaliser(method, encode_tile(tiles[0], 95))
    for tile_HWC in tiles:
        one_HWC, other_HWC = normalise(tile_HWC), normalise(bluer(tile_HWC))
        assert one_HWC is not None
        assert other_HWC is not None
        assert one_HWC.dtype == np.uint8
        before = np.abs(tile_HWC.astype(int) - bluer(tile_HWC)).mean()
        after = np.abs(one_HWC.astype(int) - other_HWC).mean()
        assert after < 0.6 * before
        again_HWC = normalise(tile_HWC)
        np.testing.assert_array_equal(one_HWC, again_HWC)


@pytest.mark.parametrize("value", [0, 128, 241, 255])
def test_a_tile_without_stains_keeps_its_colours(value: int) -> None:
    assert StainNormaliser("macenko", None)(np.full((64, 64, 3), value, np.uint8)) is None


def test_no_usable_reference() -> None:
    with pytest.raises(StoreError, match="reinhard needs a --stain-reference"):
        StainNormaliser("reinhard", None)
    with pytest.raises(StoreError, match=r"(?s)stain reference.*no image"):
        StainNormaliser("macenko", b"this is a text, not a picture")
    with pytest.raises(StoreError, match="finds no stains"):
        StainNormaliser("macenko", encode_tile(np.full((64, 64, 3), 255, np.uint8), 90))


def test_a_normalised_store(data_dir: Path, store: TileStore, tmp_path: Path, aperio: Path) -> None:
    with open_slide(aperio) as slide:
        reference = encode_tile(slide.read_region_um(1000, 1000, 256, 0.5), 95)
    spec = StoreSpec(
        tile_size_px=64, um_per_px=0.5, tiles_per_slide=8, min_tissue_share=0.9, stain_normalise="reinhard",
        stain_reference_sha256=hashlib.sha256(reference).hexdigest(),
    )  # fmt: skip
    write_store(
        data_dir, tmp_path / "store", spec, class_names=CLASS_NAMES, workers_count=1, stain_reference=reference,
        show_progress=False,
    )  # fmt: skip
    opened = TileStore.open(tmp_path / "store")
    assert opened.index.column("stain_normalised").to_pylist() == [True] * 32
    row = opened.rows_of("p0_0")[0]
    same = store.richest("p0_0", 8, 0.9)[0]
    moved_HWC, own_HWC = decode_tile(opened.tile(row), 64), decode_tile(store.tile(same), 64)
    assert np.abs(moved_HWC.astype(int) - own_HWC).mean() > 5
    wanted_HWC = StainNormaliser("reinhard", reference)(own_HWC)
    assert wanted_HWC is not None
    assert np.abs(moved_HWC.mean(axis=(0, 1)) - wanted_HWC.mean(axis=(0, 1))).max() < 3
