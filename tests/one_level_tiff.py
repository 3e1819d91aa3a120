"""Gigapixel slides that are cheap to make: one level, JPEG tiles, and many tiles that share the bytes of a few."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray


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


def glass_and_tissue(side_px: int = 512) -> list[NDArray[np.uint8]]:
    """Eight blocks for `write_one_level_bigtiff`: an eighth of the slide is noisy, pink tissue."""
    glass_HWC = np.full((side_px, side_px, 3), 240, np.uint8)
    noise_HWC = np.random.default_rng(0).integers(-30, 30, (side_px, side_px, 3))
    tissue_HWC = (np.array((200, 90, 130)) + noise_HWC).astype(np.uint8)
    return [*[glass_HWC] * 7, tissue_HWC]
