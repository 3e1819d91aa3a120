"""Where the tissue is, and the tiles that hold most of it."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import cv2
import numpy as np
from numpy.typing import NDArray

from slides.decode import encode_tile
from slides.errors import NoTissueError
from slides.pixels import READ_THREADS
from slides.reader import Slide
from slides.spec import ModelSpec

MASK_UM_PER_PX = 8.0
MAX_MASK_SIDE_PX = 4096
MIN_TISSUE_DENSITY = 0.06
"""Optical density by which green or blue must be absorbed more than red."""
MIN_COLOURED_SHARE = 0.2
"""The same difference as a share of the strongest density; black ink, shadows and edges stay below it."""
MIN_INK_DENSITY = 0.25
MIN_DARK_RED_DENSITY, MAX_DARK_COLOURED_SHARE = 0.45, 0.5
"""Ink over tissue keeps some of the tissue's colour, but lets far less red through than the tissue around."""
MIN_COMPONENT_PX = 60
"""Smaller specks of the mask are dust (60 px at 8 um/px: the area of a disc of 70 um)."""


@dataclasses.dataclass(frozen=True)
class TileRef:
    """A square of a slide.

    Attributes:
        x_px, y_px: upper left corner in pixels of level 0.
        side_px: side in pixels of level 0.
        tissue_share: 0..1, how much of it is tissue.
    """

    x_px: int
    y_px: int
    side_px: int
    tissue_share: float


def tissue_mask(thumbnail_HWC: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which pixels of a thumbnail are tissue.

    Works on optical density (Beer-Lambert: -log10 of the light that passes, relative to the slide's own
    glass). Stained tissue (eosin, haematoxylin, MSB, blood itself) absorbs green or blue more than red. Blue
    and green ink absorb red most; black ink, shadows and the edges of the slide absorb all three alike; dust
    is small. So tissue is what absorbs red clearly least. Red ink cannot be told from blood in this way and
    counts as tissue.

    Args:
        thumbnail_HWC: uint8 [H, W, 3] RGB, best at about MASK_UM_PER_PX.

    Returns:
        bool [H, W].
    """
    channels_HW = [np.asarray(c, np.uint8) for c in cv2.split(cv2.GaussianBlur(thumbnail_HWC, (3, 3), 0))]
    values = np.maximum(np.arange(256, dtype=np.float32), 1)
    red_HW, green_HW, blue_HW = (
        np.take(np.log10(glass / values), channel_HW)
        for glass, channel_HW in zip(_glass_colour(channels_HW), channels_HW, strict=True)
    )
    green_or_blue_HW = np.maximum(green_HW, blue_HW)
    strongest_HW = np.maximum(red_HW, green_or_blue_HW)
    excess_HW = green_or_blue_HW - red_HW
    coloured_HW = excess_HW > MIN_COLOURED_SHARE * strongest_HW
    stained_HW = (excess_HW > MIN_TISSUE_DENSITY) & coloured_HW
    usual_red = float(np.median(red_HW[stained_HW])) if stained_HW.any() else 0.0
    dark_HW = (red_HW > max(MIN_DARK_RED_DENSITY, usual_red + 0.25)) & (
        excess_HW < MAX_DARK_COLOURED_SHARE * strongest_HW
    )
    ink_HW = ((strongest_HW > MIN_INK_DENSITY) & ~coloured_HW) | dark_HW
    mask_HW = stained_HW.astype(np.uint8)
    disc_3, disc_5 = (cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)) for side in (3, 5))
    mask_HW[cv2.dilate(ink_HW.astype(np.uint8), disc_3) > 0] = 0
    mask_HW = cv2.morphologyEx(mask_HW, cv2.MORPH_OPEN, disc_3).astype(np.uint8)
    _, components_HW, statistics, _ = cv2.connectedComponentsWithStats(mask_HW, connectivity=8)
    large = (statistics[:, cv2.CC_STAT_AREA] >= MIN_COMPONENT_PX).astype(np.uint8)
    large[0] = 0
    mask_HW = cv2.morphologyEx(large[components_HW], cv2.MORPH_CLOSE, disc_5)
    return np.asarray(mask_HW > 0) & ~ink_HW


def slide_mask(slide: Slide, spec: ModelSpec) -> NDArray[np.bool_]:
    """`tissue_mask` of the whole slide at MASK_UM_PER_PX, finer where tiles are small; bool [H, W].

    Raises:
        ResolutionUnknownError: nobody knows the slide's resolution.
        SlideFileError: its pixels cannot be read.
    """
    um_per_px = slide.known_um_per_px()
    mask_um_per_px = min(MASK_UM_PER_PX, spec.tile_size_px * spec.um_per_px / 16)
    side_px = max(slide.size_px) * um_per_px / mask_um_per_px
    return tissue_mask(slide.thumbnail(min(MAX_MASK_SIDE_PX, max(1, round(side_px)))))


def find_tiles(slide: Slide, spec: ModelSpec, mask_HW: NDArray[np.bool_] | None = None) -> list[TileRef]:
    """The `spec.tiles_per_slide` most tissue-rich squares of a grid that starts at the upper left corner.

    Args:
        mask_HW: tissue of the whole slide, bool [H, W]; None finds it with `slide_mask`.

    Returns:
        at least one tile, richest first; equal shares (rounded to 4 decimals) in order of y, then x. Where
        more tiles are equally rich than can be taken, evenly spaced ones of that order are, so that not all
        come from the upper end of the slide. A slide smaller than a tile has one, filled up with white.

    Raises:
        NoTissueError: no square has `spec.min_tissue_share` of tissue.
        ResolutionUnknownError: nobody knows the slide's resolution.
        SlideFileError: its pixels cannot be read.
    """
    um_per_px = slide.known_um_per_px()
    width_px, height_px = slide.size_px
    side_px = max(1, round(spec.tile_size_px * spec.um_per_px / um_per_px))
    side_um = side_px * um_per_px
    if mask_HW is None:
        mask_HW = slide_mask(slide, spec)
    columns, rows = max(1, width_px // side_px), max(1, height_px // side_px)
    share_RC = _grid_shares(
        mask_HW,
        np.arange(columns + 1) * (side_px / width_px * mask_HW.shape[1]),
        np.arange(rows + 1) * (side_px / height_px * mask_HW.shape[0]),
    )
    tiles = [
        TileRef(column * side_px, row * side_px, side_px, float(share_RC[row, column]))
        for row, column in np.argwhere((share_RC >= spec.min_tissue_share) & (share_RC > 0)).tolist()
    ]
    if not tiles:
        best = 100 * float(share_RC.max())
        raise NoTissueError(
            f"{slide.path}: no tissue; the richest of {columns * rows} tiles of {side_um:.0f} um has "
            f"{best:.1f}%, {100 * spec.min_tissue_share:.0f}% are wanted; see it with `python -m slides inspect`"
        )
    tiles.sort(key=lambda tile: (-tile.tissue_share, tile.y_px, tile.x_px))
    return _richest(tiles, spec.tiles_per_slide)


def iter_tiles(
    slide: Slide, spec: ModelSpec, refs: Sequence[TileRef] | None = None
) -> Iterator[tuple[TileRef, bytes]]:
    """Cut tiles at `spec.um_per_px` and encode them as JPEG, in the order of `refs`, a few ahead in threads.

    Args:
        slide: an open slide; it must stay open while this runs.
        spec: what the model expects.
        refs: tiles to cut; None finds them with `find_tiles`.

    Yields:
        the square and its JPEG bytes (`spec.tile_size_px` a side, `spec.jpeg_quality`).

    Raises:
        as `find_tiles`.
    """
    pending_refs = iter(find_tiles(slide, spec) if refs is None else refs)

    def cut(ref: TileRef) -> bytes:
        tile_HWC = slide.read_region_um(ref.x_px, ref.y_px, spec.tile_size_px, spec.um_per_px)
        return encode_tile(tile_HWC, spec.jpeg_quality)

    pool = ThreadPoolExecutor(READ_THREADS)
    ahead: deque[tuple[TileRef, Future[bytes]]] = deque()
    try:
        for ref in pending_refs:
            ahead.append((ref, pool.submit(cut, ref)))
            if len(ahead) >= 4 * READ_THREADS:
                first, encoded = ahead.popleft()
                yield first, encoded.result()
        while ahead:
            first, encoded = ahead.popleft()
            yield first, encoded.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _richest(tiles: list[TileRef], count: int) -> list[TileRef]:
    """The first `count` of sorted tiles; of those that tie for the last places, evenly spaced ones."""
    if len(tiles) <= count:
        return tiles
    last_share = tiles[count - 1].tissue_share
    richer = [tile for tile in tiles if tile.tissue_share > last_share]
    equal = [tile for tile in tiles if tile.tissue_share == last_share]
    places = count - len(richer)
    return richer + [equal[(2 * place + 1) * len(equal) // (2 * places)] for place in range(places)]


def _glass_colour(channels_HW: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Colour of empty glass, float32 [3]: median of the brightest tenth, or white where nothing is bright."""
    darkest_HW = np.minimum(np.minimum(channels_HW[0], channels_HW[1]), channels_HW[2])
    counts = np.bincount(darkest_HW.ravel(), minlength=256)
    tenth = int(np.searchsorted(counts.cumsum(), 0.9 * darkest_HW.size))
    bright_HW = darkest_HW >= max(200, tenth)
    if not bright_HW.any():
        return np.full(3, 255, np.float32)
    return np.array([np.median(channel_HW[bright_HW]) for channel_HW in channels_HW], np.float32)


def _grid_shares(
    mask_HW: NDArray[np.bool_], x_edges: NDArray[np.float64], y_edges: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Share of True in each cell of a grid with fractional edges: exact areas through an integral image."""

    def interpolated(sums: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
        edges = np.minimum(edges, sums.shape[0] - 1)
        lower = np.minimum(edges.astype(int), sums.shape[0] - 2)
        weight = (edges - lower)[:, None]
        return sums[lower] * (1 - weight) + sums[lower + 1] * weight

    sums_HW = np.pad(mask_HW.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    at_edges = interpolated(interpolated(sums_HW, y_edges).T, x_edges).T
    areas = np.diff(np.diff(at_edges, axis=0), axis=1)
    return np.round(areas / (np.diff(y_edges)[:, None] * np.diff(x_edges)[None, :]), 4).clip(0, 1)
