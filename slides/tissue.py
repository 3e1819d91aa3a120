"""Where the tissue is, and the tiles that hold most of it."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from slides.decode import encode_tile
from slides.errors import NoTissueError
from slides.mask import tissue_mask
from slides.pixels import READ_THREADS
from slides.reader import Slide
from slides.spec import ModelSpec

MASK_UM_PER_PX = 8.0
MAX_MASK_SIDE_PX = 4096

__all__ = [
    "Overview",
    "TileRef",
    "candidate_tiles",
    "cut_tiles",
    "darkest",
    "find_tiles",
    "iter_tiles",
    "overview",
    "richest",
    "tissue_mask",
]

Cut = TypeVar("Cut")


@dataclasses.dataclass(frozen=True)
class TileRef:
    """A square of a slide.

    Attributes:
        x_px, y_px: upper left corner in pixels of level 0.
        side_px: side in pixels of level 0.
        tissue_share: 0..1, how much of it is tissue.
        darkness: optical density (base 10, mean of red, green and blue, relative to white) of what is tissue, averaged
            over the whole square. From the overview: no tile needs to be read to find the darkest.
    """

    x_px: int
    y_px: int
    side_px: int
    tissue_share: float
    darkness: float = 0.0


@dataclasses.dataclass(frozen=True)
class Overview:
    """A whole slide at MASK_UM_PER_PX, finer where tiles are small.

    Attributes:
        thumbnail_HWC: uint8 [H, W, 3] RGB.
        mask_HW: bool [H, W], True where tissue is.
    """

    thumbnail_HWC: NDArray[np.uint8]
    mask_HW: NDArray[np.bool_]


def overview(slide: Slide, spec: ModelSpec) -> Overview:
    """Look at the whole slide once: for its tissue, its tiles, and pictures of it.

    Raises:
        ResolutionUnknownError: nobody knows the slide's resolution.
        SlideFileError: its pixels cannot be read.
    """
    um_per_px = slide.known_um_per_px()
    mask_um_per_px = min(MASK_UM_PER_PX, spec.tile_size_px * spec.um_per_px / 16)
    side_px = max(slide.size_px) * um_per_px / mask_um_per_px
    thumbnail_HWC = slide.thumbnail(min(MAX_MASK_SIDE_PX, max(1, round(side_px))))
    own_um_per_px = max(slide.size_px) * um_per_px / max(thumbnail_HWC.shape[:2])
    return Overview(thumbnail_HWC, tissue_mask(thumbnail_HWC, own_um_per_px))


def find_tiles(slide: Slide, spec: ModelSpec, seen: Overview | None = None) -> list[TileRef]:
    """The `spec.tiles_per_slide` most tissue-rich squares of a grid that starts at the upper left corner.

    Args:
        seen: what `overview` gave for this slide and spec; None looks now.

    Returns:
        at least one tile, richest first; equal shares (rounded to 4 decimals) in order of y, then x. Where
        more tiles are equally rich than can be taken, evenly spaced ones of that order are, so that not all
        come from the upper end of the slide. A slide smaller than a tile has one, filled up with white.

    Raises:
        NoTissueError: no square has `spec.min_tissue_share` of tissue.
        ResolutionUnknownError: nobody knows the slide's resolution.
        SlideFileError: its pixels cannot be read.
    """
    return richest(candidate_tiles(slide, spec, seen), spec.tiles_per_slide)


def candidate_tiles(slide: Slide, spec: ModelSpec, seen: Overview | None = None) -> list[TileRef]:
    """Every square with `spec.min_tissue_share` of tissue, in the order of `find_tiles`; raises as it does."""
    um_per_px = slide.known_um_per_px()
    width_px, height_px = slide.size_px
    side_px = max(1, round(spec.tile_size_px * spec.um_per_px / um_per_px))
    side_um = side_px * um_per_px
    seen = overview(slide, spec) if seen is None else seen
    mask_HW = seen.mask_HW
    columns, rows = max(1, width_px // side_px), max(1, height_px // side_px)
    x_edges = np.arange(columns + 1) * (side_px / width_px * mask_HW.shape[1])
    y_edges = np.arange(rows + 1) * (side_px / height_px * mask_HW.shape[0])
    share_RC = _grid_means(mask_HW, x_edges, y_edges).clip(0, 1)
    darkness_RC = _grid_means(_tissue_density(seen), x_edges, y_edges)
    tiles = [
        TileRef(
            column * side_px,
            row * side_px,
            side_px,
            float(share_RC[row, column]),
            max(0.0, float(darkness_RC[row, column])),
        )
        for row, column in np.argwhere((share_RC >= spec.min_tissue_share) & (share_RC > 0)).tolist()
    ]
    if not tiles:
        best = 100 * float(share_RC.max())
        raise NoTissueError(
            f"{slide.path}: no tissue; the richest of {columns * rows} tiles of {side_um:.0f} um has "
            f"{best:.1f}%, {100 * spec.min_tissue_share:.0f}% are wanted; see it with `python -m slides inspect`"
        )
    return sorted(tiles, key=lambda tile: (-tile.tissue_share, tile.y_px, tile.x_px))


def richest(tiles: Sequence[TileRef], count: int) -> list[TileRef]:
    """The first `count` of `candidate_tiles`; of those that tie for the last places, evenly spaced ones."""
    if len(tiles) <= count:
        return list(tiles)
    last_share = tiles[count - 1].tissue_share
    richer = [tile for tile in tiles if tile.tissue_share > last_share]
    equal = [tile for tile in tiles if tile.tissue_share == last_share]
    places = count - len(richer)
    return richer + [equal[(2 * place + 1) * len(equal) // (2 * places)] for place in range(places)]


def darkest(tiles: Sequence[TileRef], count: int) -> list[TileRef]:
    """The `count` tiles with the highest darkness, darkest first; equal ones in the order of `tiles`."""
    return sorted(tiles, key=lambda tile: -tile.darkness)[:count]


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
    refs = find_tiles(slide, spec) if refs is None else refs
    return cut_tiles(slide, spec, refs, lambda _, tile_HWC: encode_tile(tile_HWC, spec.jpeg_quality))


def cut_tiles(
    slide: Slide,
    spec: ModelSpec,
    refs: Sequence[TileRef],
    finish: Callable[[TileRef, NDArray[np.uint8]], Cut],
    *,
    threads: int = READ_THREADS,
) -> Iterator[tuple[TileRef, Cut]]:
    """Read tiles at `spec.um_per_px` and do `finish` with each, in the order of `refs`.

    Args:
        finish: gets a square and its pixels, uint8 [tile_size_px, tile_size_px, 3] RGB; called from `threads` threads.
        threads: 1 reads in the calling thread; more read a few tiles ahead.

    Yields:
        the square and what `finish` returned.

    Raises:
        ResolutionUnknownError, SlideFileError: as `Slide.read_region_um`.
    """

    def cut(ref: TileRef) -> Cut:
        return finish(ref, slide.read_region_um(ref.x_px, ref.y_px, spec.tile_size_px, spec.um_per_px))

    if threads <= 1:
        for ref in refs:
            yield ref, cut(ref)
        return
    pool = ThreadPoolExecutor(threads)
    ahead: deque[tuple[TileRef, Future[Cut]]] = deque()
    try:
        for ref in refs:
            ahead.append((ref, pool.submit(cut, ref)))
            if len(ahead) >= 4 * threads:
                first, done = ahead.popleft()
                yield first, done.result()
        while ahead:
            first, done = ahead.popleft()
            yield first, done.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _tissue_density(seen: Overview) -> NDArray[np.float32]:
    """Optical density of tissue, float32 [H, W]; 0 where there is none."""
    density = -np.log10(np.maximum(np.arange(256, dtype=np.float32), 1) / 255) / 3
    density_HW = np.zeros(seen.mask_HW.shape, np.float32)
    density_HW[seen.mask_HW] = density[seen.thumbnail_HWC[seen.mask_HW]].sum(axis=1)
    return density_HW


def _grid_means(
    values_HW: NDArray[np.bool_] | NDArray[np.float32],
    x_edges: NDArray[np.float64],
    y_edges: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Mean in each cell of a grid with fractional edges, to 4 decimals: exact through an integral image."""

    def interpolated(sums: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
        edges = np.minimum(edges, sums.shape[0] - 1)
        lower = np.minimum(edges.astype(int), sums.shape[0] - 2)
        weight = (edges - lower)[:, None]
        return sums[lower] * (1 - weight) + sums[lower + 1] * weight

    sums_HW = np.asarray(cv2.integral(values_HW.astype(np.float32), sdepth=cv2.CV_64F), np.float64)
    at_edges = interpolated(interpolated(sums_HW, y_edges).T, x_edges).T
    sums_RC = np.diff(np.diff(at_edges, axis=0), axis=1)
    return np.asarray(np.round(sums_RC / (np.diff(y_edges)[:, None] * np.diff(x_edges)[None, :]), 4))
