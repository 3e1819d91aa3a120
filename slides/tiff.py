"""Plain TIFF files through tifffile, and shortcuts that only a TIFF allows.

Strips and tiles ("segments") are decoded one at a time, so memory depends on the segment, not on the slide.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray

from slides.errors import SlideFileError
from slides.pixels import blend_on_white, in_threads, plausible_um_per_px

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_SEGMENT_BYTES = 256 * 1024 * 1024
CACHE_BYTES = 128 * 1024 * 1024
CONVERT_HINT = "convert it: vips tiffsave IN.tif OUT.tif --tile --pyramid --compression jpeg --Q 90"

# tifffile logs what it then raises; an application that wants its log still gets it
logging.getLogger("tifffile").addHandler(logging.NullHandler())

_RGB_JPEG_MARKER = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"  # APP14, transform 0: RGB


def check_complete(path: Path) -> None:
    """Refuse a TIFF that points behind the end of its file; what tifffile cannot parse is left to others.

    Raises:
        SlideFileError: the file is truncated.
    """
    try:
        with tifffile.TiffFile(path) as file:
            size_bytes = file.filehandle.size
            if not len(file.pages.first.dataoffsets):
                raise SlideFileError(
                    f"{path}: the file is truncated or damaged: it does not say where its pixels are"
                )
            needed_bytes = [
                int(
                    (np.asarray(page.dataoffsets, np.int64) + np.asarray(page.databytecounts, np.int64)).max()
                )
                for page in map(_full_page, file.pages)
                if len(page.dataoffsets) and len(page.dataoffsets) == len(page.databytecounts)
            ]
    except SlideFileError:
        raise
    except Exception:  # tifffile raises many kinds on damaged directories; the reader proper will say more
        return
    if max(needed_bytes, default=0) > size_bytes:
        raise SlideFileError(
            f"{path}: the file is truncated: it has {size_bytes} bytes, its images need {max(needed_bytes)}; "
            "copy or download it again"
        )


class TiffPixels:
    """A plain TIFF: level 0 and, where tifffile finds them, its reduced copies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _opened(path)
        try:
            self._pages = self._readable_pages()
            self._maps = [_memory_map(path, page) for page in self._pages]
            self.um_per_px = _stated_um_per_px(self._pages[0])
        except BaseException:
            self._file.close()
            raise
        self.level_sizes_px: list[tuple[int, int]] = [
            (page.imagewidth, page.imagelength) for page in self._pages
        ]
        width_px, first = self.level_sizes_px[0][0], self._pages[0]
        striped = not first.is_tiled
        self.block_px = (width_px, max(64, 2048 * 2048 // width_px)) if striped else (2048, 2048)
        self._read_lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int], NDArray[np.uint8]] = OrderedDict()
        self._cached_bytes = 0
        self._cache_lock = threading.Lock()

    def _readable_pages(self) -> list[tifffile.TiffPage]:
        try:
            levels = self._file.series[0].levels
            pages = [level.keyframe for level in levels]
        except Exception as error:
            raise SlideFileError(f"{self._path}: the TIFF's images cannot be listed ({error})") from error
        for page in pages:
            reason = _unreadable(page)
            if reason:
                raise SlideFileError(f"{self._path}: {reason}; {CONVERT_HINT}")
        return pages

    def read(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> NDArray[np.uint8]:
        image_HWC = np.full((height_px, width_px, 3), 255, np.uint8)
        level_width_px, level_height_px = self.level_sizes_px[level]
        left, top = max(0, x_px), max(0, y_px)
        right, bottom = min(level_width_px, x_px + width_px), min(level_height_px, y_px + height_px)
        if left >= right or top >= bottom:
            return image_HWC
        page, mapped = self._pages[level], self._maps[level]
        if mapped is not None:
            image_HWC[top - y_px : bottom - y_px, left - x_px : right - x_px] = _as_rgb(
                np.asarray(mapped[top:bottom, left:right]), page
            )
            return image_HWC
        segment_width_px, segment_height_px = _segment_size(page)
        columns = -(-level_width_px // segment_width_px)
        for row in range(top // segment_height_px, (bottom - 1) // segment_height_px + 1):
            for column in range(left // segment_width_px, (right - 1) // segment_width_px + 1):
                x0, y0 = column * segment_width_px, row * segment_height_px
                segment_HWC = self._segment(level, row * columns + column)
                if segment_HWC is None:
                    continue
                a, b = max(left, x0), min(right, x0 + segment_HWC.shape[1])
                c, d = max(top, y0), min(bottom, y0 + segment_HWC.shape[0])
                if a < b and c < d:
                    part_HWC = segment_HWC[c - y0 : d - y0, a - x0 : b - x0]
                    image_HWC[c - y_px : d - y_px, a - x_px : b - x_px] = part_HWC
        return image_HWC

    def _segment(self, level: int, index: int) -> NDArray[np.uint8] | None:
        """Decoded segment as uint8 [h, w, 3], or None where the file leaves it out (sparse)."""
        key = (level, index)
        with self._cache_lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        page = self._pages[level]
        if page.databytecounts[index] == 0:
            return None
        with self._read_lock:
            file = self._file.filehandle
            file.seek(page.dataoffsets[index])
            data = file.read(page.databytecounts[index])
        decoded, _, shape = page.decode(data, index, jpegtables=page.jpegtables)
        if decoded is None:
            return None
        segment_HWC = _as_rgb(decoded[0, : shape[1], : shape[2]], page)
        with self._cache_lock:
            if key not in self._cache:
                self._cache[key] = segment_HWC
                self._cached_bytes += segment_HWC.nbytes
            while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return segment_HWC

    def overview(self, width_px: int, height_px: int) -> NDArray[np.uint8] | None:
        return jpeg_overview(self._path, self.level_sizes_px[0], (width_px, height_px))

    def close(self) -> None:
        self._maps = []
        self._file.close()


def jpeg_overview(
    path: Path, size_px: tuple[int, int], target_px: tuple[int, int]
) -> NDArray[np.uint8] | None:
    """A huge JPEG-compressed TIFF reduced in the DCT domain (1/8 costs little more than entropy decoding).

    Args:
        path: any file.
        size_px: width and height of the image that is meant, which must be the TIFF's first one.
        target_px: width and height of the result, at most 1/8 of `size_px`.

    Returns:
        uint8 [target_px[1], target_px[0], 3] RGB, or None where the file is no such TIFF.
    """
    if size_px[0] < 8 * target_px[0] or size_px[1] < 8 * target_px[1]:
        return None
    try:
        file = tifffile.TiffFile(path)
    except (tifffile.TiffFileError, ValueError, OSError):
        return None
    with file:
        page = file.pages.first
        segment_width_px, segment_height_px = _segment_size(page)
        usable = (
            page.compression == 7
            and (page.imagewidth, page.imagelength) == size_px
            and page.bitspersample == 8
            and page.planarconfig == 1
            and page.samplesperpixel in (1, 3)
            and segment_width_px % 8 == 0
            and segment_height_px % 8 == 0
            and segment_width_px * segment_height_px * 3 <= MAX_SEGMENT_BYTES
        )
        if not usable:
            return None
        rgb = page.samplesperpixel == 3 and page.photometric == 2
        tables = (page.jpegtables or b"\xff\xd8\xff\xd9")[:-2] + (_RGB_JPEG_MARKER if rgb else b"")
        columns, rows = -(-size_px[0] // segment_width_px), -(-size_px[1] // segment_height_px)
        rows_a_band = max(1, 2048 // segment_height_px)
        target_HWC = np.full((target_px[1], target_px[0], 3), 255, np.uint8)
        lock = threading.Lock()

        def fill(band: tuple[int, int]) -> None:
            first, last = band
            height_px = min(last * segment_height_px, size_px[1]) - first * segment_height_px
            step_x, step_y = segment_width_px // 8, segment_height_px // 8
            reduced_HWC = np.full(((last - first) * step_y, columns * step_x, 3), 255, np.uint8)
            for index in range(first * columns, last * columns):
                if page.databytecounts[index] == 0:
                    continue
                with lock:
                    file.filehandle.seek(page.dataoffsets[index])
                    data = file.filehandle.read(page.databytecounts[index])
                decoded_HWC = simplejpeg.decode_jpeg(tables + data[2:], "RGB", min_height=1, min_width=1)
                row, column = divmod(index - first * columns, columns)
                part_HWC = reduced_HWC[
                    row * step_y : (row + 1) * step_y, column * step_x : (column + 1) * step_x
                ]
                part_HWC[: decoded_HWC.shape[0], : decoded_HWC.shape[1]] = decoded_HWC[:step_y, :step_x]
            top = round(first * segment_height_px / size_px[1] * target_px[1])
            bottom = round((first * segment_height_px + height_px) / size_px[1] * target_px[1])
            if bottom > top:
                used_HWC = reduced_HWC[: max(1, height_px // 8), : size_px[0] // 8]
                area_px = (target_px[0], bottom - top)
                target_HWC[top:bottom] = cv2.resize(used_HWC, area_px, interpolation=cv2.INTER_AREA)

        bands = [(row, min(rows, row + rows_a_band)) for row in range(0, rows, rows_a_band)]
        in_threads(fill, bands, f"reading {path.name}")
    return target_HWC


def _opened(path: Path) -> tifffile.TiffFile:
    try:
        file = tifffile.TiffFile(path)
    except Exception as error:  # TiffFileError, struct.error, ValueError, ... on damaged directories
        raise SlideFileError(f"{path}: the TIFF is truncated or damaged ({error}); copy it again") from error
    if not len(file.pages):
        file.close()
        raise SlideFileError(f"{path}: the TIFF is truncated or damaged: it holds no image; copy it again")
    return file


def _full_page(page: tifffile.TiffPage | tifffile.TiffFrame) -> tifffile.TiffPage:
    return page if isinstance(page, tifffile.TiffPage) else page.aspage()


def _segment_size(page: tifffile.TiffPage) -> tuple[int, int]:
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(page.rowsperstrip or page.imagelength, page.imagelength)


def _unreadable(page: tifffile.TiffPage) -> str | None:
    """Why this page cannot be read here, or None."""
    samples, photometric = page.samplesperpixel, page.photometric
    if page.imagewidth < 1 or page.imagelength < 1 or page.imagedepth != 1:
        return "the TIFF's image is empty or a volume"
    if page.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)) or page.bitspersample not in (8, 16):
        return f"{page.bitspersample} bit samples ({page.dtype}) are not supported, 8 and 16 bit are"
    if page.planarconfig != 1 and samples > 1:
        return "colour planes that are stored apart (PlanarConfiguration 2) are not supported"
    if samples not in {0: (1, 2), 1: (1, 2), 2: (3, 4), 6: (3, 4)}.get(photometric, ()):
        name = getattr(photometric, "name", photometric)
        return f"photometric interpretation {name} with {samples} samples is not supported, RGB and grey are"
    width_px, height_px = _segment_size(page)
    needed_bytes = width_px * height_px * samples * page.bitspersample // 8
    if page.compression != 1 and needed_bytes > MAX_SEGMENT_BYTES:
        return (
            f"its {page.imagewidth} x {page.imagelength} px are compressed in pieces of "
            f"{needed_bytes // 2**20} MiB; {MAX_SEGMENT_BYTES // 2**20} MiB at most are decoded at once"
        )
    return None


def _memory_map(path: Path, page: tifffile.TiffPage) -> NDArray[Any] | None:
    """The page's uncompressed pixels [H, W, samples] as a read-only map of the file, or None."""
    if page.compression != 1 or page.is_tiled or not page.is_contiguous or page.predictor != 1:
        return None
    shape = (page.imagelength, page.imagewidth, page.samplesperpixel)
    dtype = np.dtype(page.dtype or np.uint8).newbyteorder(page.parent.byteorder)
    if sum(page.databytecounts) < int(np.prod(shape)) * dtype.itemsize:
        return None
    return np.memmap(path, dtype, "r", int(page.dataoffsets[0]), shape)


def _as_rgb(samples_HWC: NDArray[Any], page: tifffile.TiffPage) -> NDArray[np.uint8]:
    """Samples as stored to uint8 RGB: 16 bit to its high byte, alpha on white, grey to three channels."""
    if samples_HWC.dtype != np.uint8:
        samples_HWC = (samples_HWC >> 8).astype(np.uint8)
    count = samples_HWC.shape[2]
    colours_HWC = samples_HWC[:, :, : 1 if count < 3 else 3]
    if page.photometric == 0:
        colours_HWC = 255 - colours_HWC
    if colours_HWC.shape[2] == 1:
        colours_HWC = np.repeat(colours_HWC, 3, axis=2)
    image_HWC = np.ascontiguousarray(colours_HWC)
    if count in (2, 4) and page.extrasamples and page.extrasamples[0] in (1, 2):
        if image_HWC.base is not None:
            image_HWC = image_HWC.copy()
        alpha_HW = samples_HWC[:, :, -1]
        if page.extrasamples[0] == 1:  # premultiplied: white shows through what alpha leaves
            image_HWC = np.minimum(255, image_HWC.astype(np.uint16) + (255 - alpha_HW)[:, :, None]).astype(
                np.uint8
            )
        else:
            blend_on_white(image_HWC, alpha_HW)
    return image_HWC


def _stated_um_per_px(page: tifffile.TiffPage) -> float | None:
    unit_um = {2: 25_400.0, 3: 10_000.0}.get(int(page.tags.valueof(296, 2)))
    values = []
    for code in (282, 283):
        resolution = page.tags.valueof(code)
        if unit_um is None or not isinstance(resolution, tuple) or not resolution[0] or not resolution[1]:
            return None
        values.append(unit_um * resolution[1] / resolution[0])
    return plausible_um_per_px(values[0], values[1])
