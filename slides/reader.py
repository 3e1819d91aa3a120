"""Opening slides and reading pixels at a resolution in micrometres, in bounded memory.

openslide reads whatever it knows; a plain TIFF that it refuses (striped, for instance) is read through
tifffile (`slides.tiff`). Whatever is read, no more than a few blocks of `BLOCK_PIXELS` are in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
import openslide
from numpy.typing import NDArray

from slides import tiff
from slides.errors import ResolutionUnknownError, SlideFileError
from slides.pixels import BLOCK_PIXELS, Pixels, blend_on_white, in_threads, plausible_um_per_px

MAX_STEP_PX = 256
"""Side of the source of one resulting pixel above which a reduction is done in two steps, to bound memory."""


class Slide:
    """An open slide; a context manager. Reads may come from several threads.

    Attributes:
        path: the file.
        size_px: width and height of level 0 in pixels.
        um_per_px: micrometres per pixel of level 0, or None where nobody knows.
        level_count: how many resolutions the file holds.
    """

    def __init__(self, path: Path, pixels: Pixels, um_per_px: float | None) -> None:
        self.path = path
        self._pixels = pixels
        self.size_px: tuple[int, int] = pixels.level_sizes_px[0]
        self.um_per_px = um_per_px
        self.level_count = len(pixels.level_sizes_px)
        self._downsamples = [self.size_px[0] / width_px for width_px, _ in pixels.level_sizes_px]

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Slide({str(self.path)!r}, size_px={self.size_px}, um_per_px={self.um_per_px})"

    def close(self) -> None:
        """Close the file; the slide cannot be read afterwards."""
        self._pixels.close()

    def known_um_per_px(self) -> float:
        """Resolution of level 0.

        Raises:
            ResolutionUnknownError: the file does not state it and `open_slide` was not given it.
        """
        if self.um_per_px is None:
            raise ResolutionUnknownError(
                f"{self.path}: the file does not state a microscope's resolution; "
                "give it as um_per_px (--um-per-px), for instance 0.25 for a 40x scan or 0.5 for 20x"
            )
        return self.um_per_px

    def thumbnail(self, max_side_px: int) -> NDArray[np.uint8]:
        """The whole slide, reduced so that its longer side has at most `max_side_px` pixels (never enlarged).

        Returns:
            uint8 [H, W, 3] RGB.

        Raises:
            SlideFileError: the pixels cannot be read.
        """
        if max_side_px < 1:
            raise ValueError(f"max_side_px must be 1 or more, not {max_side_px}")
        width_px, height_px = self.size_px
        scale = min(1.0, max_side_px / max(self.size_px))
        target_px = (max(1, round(width_px * scale)), max(1, round(height_px * scale)))
        with _reading(self.path):
            if self._level_for(1 / scale) == 0 and math.prod(self.size_px) > 16 * BLOCK_PIXELS:
                overview_HWC = self._pixels.overview(*target_px)
                if overview_HWC is not None:
                    return overview_HWC
        return self._read_scaled(0.0, 0.0, float(width_px), float(height_px), target_px)

    def read_region_um(self, x_px: int, y_px: int, side_px: int, um_per_px: float) -> NDArray[np.uint8]:
        """A square of the slide at a wanted resolution.

        Args:
            x_px, y_px: upper left corner in pixels of level 0; may lie outside of the slide.
            side_px: side of the result in its own pixels.
            um_per_px: resolution of the result, micrometres per pixel.

        Returns:
            uint8 [side_px, side_px, 3] RGB, C-contiguous: read from the coarsest level that is no coarser
            than the result, then reduced with cv2.INTER_AREA; white outside of the slide.

        Raises:
            ResolutionUnknownError: see `known_um_per_px`.
            SlideFileError: the pixels cannot be read.
        """
        extent_px = side_px * um_per_px / self.known_um_per_px()
        return self._read_scaled(float(x_px), float(y_px), extent_px, extent_px, (side_px, side_px))

    def level_for_um(self, um_per_px: float) -> int:
        """The level that `read_region_um` reads for this resolution: the coarsest that is no coarser.

        Raises:
            ResolutionUnknownError: see `known_um_per_px`.
        """
        return self._level_for(um_per_px / self.known_um_per_px())

    def _level_for(self, downsample: float) -> int:
        """The coarsest level that is no coarser than `downsample` (but for rounding)."""
        fine = [level for level, own in enumerate(self._downsamples) if own <= downsample * 1.005]
        return max(fine, default=0)

    def _read_scaled(
        self, x_px: float, y_px: float, width_px: float, height_px: float, target_px: tuple[int, int]
    ) -> NDArray[np.uint8]:
        """The rectangle of level 0 (any float coordinates) as uint8 [target_px[1], target_px[0], 3]."""
        level = self._level_for(min(width_px / target_px[0], height_px / target_px[1]))
        own = self._downsamples[level]
        left, top = x_px / own, y_px / own
        step_x, step_y = width_px / own / target_px[0], height_px / own / target_px[1]
        if max(step_x, step_y) > MAX_STEP_PX:
            times = math.ceil(max(step_x, step_y) / MAX_STEP_PX)
            finer_px = (target_px[0] * times, target_px[1] * times)
            finer_HWC = self._read_scaled(x_px, y_px, width_px, height_px, finer_px)
            return np.asarray(cv2.resize(finer_HWC, target_px, interpolation=cv2.INTER_AREA), np.uint8)
        block_width_px, block_height_px = self._pixels.block_px
        columns, rows = max(1, int(block_width_px / step_x)), max(1, int(block_height_px / step_y))
        if step_x * target_px[0] * step_y * target_px[1] <= BLOCK_PIXELS:
            columns, rows = target_px
        target_HWC = np.empty((target_px[1], target_px[0], 3), np.uint8)

        def fill(block: tuple[int, int]) -> None:
            column, row = block
            column_end, row_end = min(column + columns, target_px[0]), min(row + rows, target_px[1])
            x0, y0 = round(left + column * step_x), round(top + row * step_y)
            x1, y1 = (
                max(x0 + 1, round(left + column_end * step_x)),
                max(y0 + 1, round(top + row_end * step_y)),
            )
            source_HWC = self._pixels.read(level, x0, y0, x1 - x0, y1 - y0)
            size_px = (column_end - column, row_end - row)
            if size_px != (x1 - x0, y1 - y0):
                source_HWC = np.asarray(
                    cv2.resize(source_HWC, size_px, interpolation=cv2.INTER_AREA), np.uint8
                )
            target_HWC[row:row_end, column:column_end] = source_HWC

        blocks = [(c, r) for r in range(0, target_px[1], rows) for c in range(0, target_px[0], columns)]
        with _reading(self.path):
            in_threads(fill, blocks, f"reading {self.path.name}")
        return target_HWC


def open_slide(path: Path | str, *, um_per_px: float | None = None) -> Slide:
    """Open a slide.

    Args:
        path: any format of openslide, or a plain 8 or 16 bit TIFF (strips or tiles; deflate, JPEG, ...).
        um_per_px: micrometres per pixel of level 0; wins over what the file says.

    Returns:
        an open Slide, to be closed (or used in a `with` statement).

    Raises:
        SlideFileError: missing, a folder, empty, truncated, no slide, or only readable with too much memory.
    """
    path = Path(path)
    if um_per_px is not None and not (math.isfinite(um_per_px) and um_per_px > 0):
        raise SlideFileError(f"{path}: um_per_px must be a number above 0, not {um_per_px!r}")
    try:
        with path.open("rb") as stream:
            head = stream.read(16)
    except FileNotFoundError as error:
        raise SlideFileError(f"{path}: there is no such slide; check the path") from error
    except OSError as error:
        raise SlideFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not head:
        raise SlideFileError(f"{path}: the file has zero bytes; copy or download it again")
    pixels = _open_pixels(path, head)
    known = um_per_px if um_per_px is not None else pixels.um_per_px
    return Slide(path, pixels, known)


class _reading:
    """Turns what a decoder raises into SlideFileError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, (SlideFileError, MemoryError)):
            raise SlideFileError(
                f"{self.path}: pixels cannot be read, the file is truncated or damaged: {error}"
            ) from error


def _open_pixels(path: Path, head: bytes) -> Pixels:
    is_tiff = head[:4] in tiff.SIGNATURES
    if is_tiff:
        tiff.check_complete(path)
    try:
        return OpenslidePixels(path)
    except openslide.OpenSlideError as error:  # unsupported formats included
        if is_tiff:
            return tiff.TiffPixels(path)
        if head[:3] == b"\xff\xd8\xff" or head[:4] == b"\x89PNG":
            raise SlideFileError(
                f"{path}: is a JPEG or PNG image, not a slide; convert it to TIFF, or send it as a tile"
            ) from error
        raise SlideFileError(
            f"{path}: no slide that openslide or a TIFF reader knows; it starts with {head[:8]!r} ({error})"
        ) from error


class OpenslidePixels:
    """A slide that openslide reads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slide = openslide.OpenSlide(str(path))
        self.level_sizes_px: list[tuple[int, int]] = list(self._slide.level_dimensions)
        self.block_px = (2048, 2048)
        self.um_per_px = _stated_um_per_px(self._slide.properties)

    def read(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> NDArray[np.uint8]:
        own_x = self.level_sizes_px[0][0] / self.level_sizes_px[level][0]
        own_y = self.level_sizes_px[0][1] / self.level_sizes_px[level][1]
        corner = (round(x_px * own_x), round(y_px * own_y))
        image_HWC4 = np.asarray(self._slide.read_region(corner, level, (width_px, height_px)))
        image_HWC = np.asarray(cv2.cvtColor(image_HWC4, cv2.COLOR_RGBA2RGB), np.uint8)
        # The smallest of whole pixels as numbers, whose highest byte is alpha: four times as fast as that of each fourth byte.
        if image_HWC4.view("<u4").min() < 0xFF000000:
            blend_on_white(image_HWC, image_HWC4[:, :, 3])
        return image_HWC

    def overview(self, width_px: int, height_px: int) -> NDArray[np.uint8] | None:
        return tiff.jpeg_overview(self._path, self.level_sizes_px[0], (width_px, height_px))

    def close(self) -> None:
        self._slide.close()


def _stated_um_per_px(properties: Mapping[str, str]) -> float | None:
    stated = []
    for axis in "xy":
        try:
            stated.append(float(properties[f"openslide.mpp-{axis}"]))
        except (KeyError, ValueError):
            unit = {"centimeter": 10_000.0, "inch": 25_400.0}.get(properties.get("tiff.ResolutionUnit", ""))
            try:
                stated.append((unit or 0.0) / float(properties[f"tiff.{axis.upper()}Resolution"]))
            except (KeyError, ValueError, ZeroDivisionError):
                return None
    return plausible_um_per_px(*stated)
