"""The tiles that are measured with: JPEG files as a client sends them, all different."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from perf.errors import PerfInputError
from slides.decode import decode_tile, encode_tile
from slides.demo_render import EOSIN, SlideLook, render_slide
from slides.errors import TileDecodeError

JPEG_QUALITY = 90
"""The default of `slides.spec.ModelSpec`; tiles travel 4:4:4."""
_GRID = 8
_SUFFIXES = (".jpg", ".jpeg", ".png")


def benchmark_tiles(count: int = 16, size_px: int = 512, seed: int = 3) -> list[bytes]:
    """Tiles cut from a made-up slide, those with the most tissue first; the same arguments give the same bytes.

    Args:
        count: 1 to 64.
        size_px: side of a tile, 64 to 2048.
        seed: of the slide.

    Raises:
        PerfInputError: an impossible number.
    """
    if not 1 <= count <= _GRID * _GRID:
        raise PerfInputError(f"the number of tiles must be from 1 to {_GRID * _GRID}, not {count}.")
    if not 64 <= size_px <= 2048:
        raise PerfInputError(f"the side of a tile must be from 64 to 2048 px, not {size_px}.")
    stain_R, stain_G, stain_B = map(float, EOSIN)
    look = SlideLook(
        size_px=(_GRID * size_px, _GRID * size_px),
        striated_share=0.5,
        stain_RGB=(stain_R, stain_G, stain_B),
        glass_RGB=(240.0, 238.0, 241.0),
    )
    slide_HWC = render_slide(look, np.random.default_rng(seed))
    cells = (
        slide_HWC.reshape(_GRID, size_px, _GRID, size_px, 3).swapaxes(1, 2).reshape(-1, size_px, size_px, 3)
    )
    darkest_first = np.argsort([float(cell.mean()) for cell in cells], kind="stable")
    return [encode_tile(cells[index], JPEG_QUALITY) for index in darkest_first[:count]]


def photograph_tiles(directory: Path, count: int = 16, size_px: int = 512) -> list[bytes]:
    """Tiles cut from the first photographs of a directory, in the order of their names, from the upper left corner of each.

    One that is smaller than a tile is continued by its mirror image, so that nothing is resampled; tiles are encoded as
    clients encode theirs.

    Args:
        directory: of JPEG and PNG files.
        count: photographs, at least 1.
        size_px: side of a tile, 64 to 2048.

    Raises:
        PerfInputError: impossible numbers, too few photographs, or one that cannot be read or is less than half a tile.
    """
    if count < 1 or not 64 <= size_px <= 2048:
        raise PerfInputError(f"{count} tiles of {size_px} px: at least 1, of 64 to 2048 px.")
    paths = _pictures(directory)
    if len(paths) < count:
        raise PerfInputError(f"{directory} holds {len(paths)} photographs, and {count} are needed.")
    tiles = []
    for path in paths[:count]:
        try:
            with Image.open(path, formats=("JPEG", "PNG")) as opened:
                image_HWC = np.asarray(opened.convert("RGB"))[:size_px, :size_px]
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise PerfInputError(f"{path} cannot be read: {error}") from error
        missing = [size_px - side for side in image_HWC.shape[:2]]
        if max(missing) > size_px // 2:
            raise PerfInputError(f"{path} is less than half a tile of {size_px} px.")
        whole_HWC = np.pad(image_HWC, [(0, missing[0]), (0, missing[1]), (0, 0)], mode="symmetric")
        tiles.append(encode_tile(whole_HWC, JPEG_QUALITY))
    return tiles


def tiles_in(directory: Path) -> list[bytes]:
    """The JPEG and PNG files of a directory, in the order of their names.

    Raises:
        PerfInputError: there are none, or one cannot be decoded.
    """
    tiles = []
    for path in _pictures(directory):
        tiles.append(path.read_bytes())
        try:
            decode_tile(tiles[-1], 64)
        except TileDecodeError as error:
            raise PerfInputError(f"{path}: {error}") from error
    return tiles


def _pictures(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise PerfInputError(f"{directory} is no directory; name one that holds JPEG or PNG files.")
    paths = sorted(path for path in directory.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise PerfInputError(f"{directory} holds no file that ends in {', '.join(_SUFFIXES)}.")
    return paths
