"""Real slide files for the tests of `slides`: a small demo set and hand-written TIFFs."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray

from slides.demo import make_demo_slides
from slides.spec import ModelSpec


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small demo slides of four patients in two centres."""
    out_dir = tmp_path_factory.mktemp("demo") / "with a space"
    return make_demo_slides(out_dir, slides=4, patients=4, centers=2, seed=3, size_px=(2048, 1536), workers=1)


@pytest.fixture(scope="session")
def demo_slide(demo_dir: Path) -> Path:
    return sorted((demo_dir / "train").iterdir())[0]


@pytest.fixture
def spec() -> ModelSpec:
    return ModelSpec(
        class_names=("CE", "LAA"),
        tile_size_px=128,
        um_per_px=0.5,
        input_size_px=64,
        tiles_per_slide=6,
        min_tissue_share=0.5,
    )


def write_one_level_bigtiff(path: Path, side_px: int, tiles_HWC: Sequence[NDArray[np.uint8]]) -> None:
    """A square BigTIFF (JPEG tiles, 0.5 um/px, one level) in which many tiles share the bytes of a few.

    So ten gigapixels fit into a megabyte. Tile (row, column) shows `tiles_HWC[(row // 7 + column // 7) % n]`.
    """
    tile_px = tiles_HWC[0].shape[0]
    columns = -(-side_px // tile_px)
    count = columns * columns
    encoded = [simplejpeg.encode_jpeg(tile_HWC, 85, "RGB", "420") for tile_HWC in tiles_HWC]
    starts = np.cumsum([16, *map(len, encoded)]).astype(np.uint64)
    row, column = np.divmod(np.arange(count), columns)
    shown = (row // 7 + column // 7) % len(encoded)
    offsets_at = int(starts[-1])
    counts_at = offsets_at + 8 * count
    entries: list[tuple[int, int, int, bytes]] = [
        (256, 4, 1, struct.pack("<I", side_px)),
        (257, 4, 1, struct.pack("<I", side_px)),
        (258, 3, 3, struct.pack("<HHH", 8, 8, 8)),
        (259, 3, 1, struct.pack("<H", 7)),
        (262, 3, 1, struct.pack("<H", 6)),
        (277, 3, 1, struct.pack("<H", 3)),
        (282, 5, 1, struct.pack("<II", 20_000, 1)),
        (283, 5, 1, struct.pack("<II", 20_000, 1)),
        (284, 3, 1, struct.pack("<H", 1)),
        (296, 3, 1, struct.pack("<H", 3)),
        (322, 4, 1, struct.pack("<I", tile_px)),
        (323, 4, 1, struct.pack("<I", tile_px)),
        (324, 16, count, struct.pack("<Q", offsets_at)),
        (325, 16, count, struct.pack("<Q", counts_at)),
        (530, 3, 2, struct.pack("<HH", 2, 2)),
    ]
    with path.open("wb") as stream:
        stream.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, counts_at + 8 * count))
        stream.writelines(encoded)
        stream.write(starts[:-1][shown].astype("<u8").tobytes())
        stream.write(np.array([len(data) for data in encoded])[shown].astype("<u8").tobytes())
        stream.write(struct.pack("<Q", len(entries)))
        for tag, kind, values, data in entries:
            stream.write(struct.pack("<HHQ", tag, kind, values) + data.ljust(8, b"\0"))
        stream.write(struct.pack("<Q", 0))


@pytest.fixture(scope="session")
def huge_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100,000 x 100,000 px in one level, an eighth of it tissue."""
    path = tmp_path_factory.mktemp("huge") / "huge.tif"
    glass_HWC = np.full((512, 512, 3), 240, np.uint8)
    noise_HWC = np.random.default_rng(0).integers(-30, 30, (512, 512, 3))
    tissue_HWC = (np.array((200, 90, 130)) + noise_HWC).astype(np.uint8)
    write_one_level_bigtiff(path, 100_000, [*[glass_HWC] * 7, tissue_HWC])
    return path
