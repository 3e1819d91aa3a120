"""What on a slide is tissue, and what is glass, ink, dust or shadow.

All of it by optical density (Beer-Lambert: -log10 of the light that passes, relative to the slide's own glass), in which
what lies over each other adds up. Stains (eosin, haematoxylin, MSB) and blood absorb green or blue more than red; black
ink, shadows and the rims of glass absorb all three alike; blue and green ink absorb red most.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

MIN_TISSUE_DENSITY = 0.06
"""Optical density by which green or blue must be absorbed more than red."""
MIN_COLOURED_SHARE = 0.2
"""The same difference as a share of the strongest density; black ink, shadows and edges stay below it."""
MIN_INK_DENSITY = 0.25
MIN_DARK_RED_DENSITY, MAX_DARK_COLOURED_SHARE = 0.45, 0.5
"""Ink over tissue keeps some of the tissue's colour, but lets far less red through than the tissue around."""
MAX_BLUE_TO_GREEN_CHANGE = 0.1
"""Within a slide the ratio of blue to green density hardly depends on the amount of either stain (0.57 to 0.68 on an
Aperio scan of skin), so dark tissue keeps it. Ink over tissue does not."""
MIN_RED_INK_DENSITY, MAX_RED_INK_RED, MIN_RED_INK_BLUE = 0.45, 0.14, 0.55
"""Red ink stops green and blue and lets nearly all red through: of green's density red has 0.07, tissue 0.22 or more."""
MAX_RED_INK_OF_USUAL = 0.65
"""... and it lets through so much more than what is usual on the slide, whose stain may be a red one."""
MIN_STROKE_UM = 24.0
"""Narrower dark spots are nuclei, not strokes of a pen."""
MIN_STROKE_LENGTH_UM = 300.0
"""Dark pieces of this length are strokes even where they are thinner."""
MIN_PIECE_UM2 = 3840.0
"""A piece of tissue of this area (a disc of 70 um), or of a quarter of the image, counts whatever its colour."""
MIN_FRAGMENT_UM2 = 640.0
"""A smaller one counts if it has the colour of the slide's larger pieces: dust has not."""
_GLASS, _STAINED, _INK, _RED_INK = 0, 1, 2, 3
_BAND_PX = 256


class _Usual(NamedTuple):
    """The slide's own colours: of its glass, and medians over what is stained."""

    glass_RGB: NDArray[np.float32]
    red: float
    red_to_green: float
    blue_to_green: float


def tissue_mask(thumbnail_HWC: NDArray[np.uint8], um_per_px: float = 8.0) -> NDArray[np.bool_]:
    """Which pixels of a thumbnail are tissue.

    Red ink is told from tissue by its purity, on glass; over tissue, or where most of what is coloured is red ink, it
    counts as tissue.

    Args:
        thumbnail_HWC: uint8 [H, W, 3] RGB, best at 8 um/px.
        um_per_px: micrometres per pixel of the thumbnail.

    Returns:
        bool [H, W].
    """
    blurred_HWC = np.asarray(cv2.GaussianBlur(thumbnail_HWC, (3, 3), 0), np.uint8)
    usual = _usual(blurred_HWC)
    height_px, width_px = thumbnail_HWC.shape[:2]
    class_HW = np.empty((height_px, width_px), np.uint8)
    for top in range(0, height_px, _BAND_PX):  # densities take six times the thumbnail's memory
        class_HW[top : top + _BAND_PX] = _classes(blurred_HWC[top : top + _BAND_PX], usual)
    stroke, fringe, pore = (_disc(um / um_per_px) for um in (MIN_STROKE_UM, 24.0, 40.0))
    dark_HW = (class_HW >= _INK).astype(np.uint8)
    thick_HW = np.asarray(cv2.morphologyEx(dark_HW, cv2.MORPH_OPEN, stroke), np.uint8)
    ink_HW = thick_HW | _long_pieces(dark_HW, MIN_STROKE_LENGTH_UM / um_per_px)
    mask_HW = (class_HW == _STAINED).astype(np.uint8)
    around = round(MIN_STROKE_UM / um_per_px) * 2 + 1
    stained_around_HW = cv2.blur(mask_HW * np.uint8(255), (around, around)) > 127
    mask_HW[(dark_HW > ink_HW) & stained_around_HW & (class_HW == _INK)] = 1  # nuclei
    mask_HW[cv2.dilate(ink_HW, fringe) > 0] = 0
    mask_HW = np.asarray(cv2.morphologyEx(mask_HW, cv2.MORPH_OPEN, _disc(3)), np.uint8)
    kept_HW = _without_dust(mask_HW, blurred_HWC, usual, um_per_px).astype(np.uint8)
    return np.asarray(cv2.morphologyEx(kept_HW, cv2.MORPH_CLOSE, pore) > ink_HW)


def _usual(image_HWC: NDArray[np.uint8]) -> _Usual:
    step = max(1, round((image_HWC.shape[0] * image_HWC.shape[1] / 1e6) ** 0.5))
    some_HWC = np.ascontiguousarray(image_HWC[::step, ::step])
    glass_RGB = _glass_colour(some_HWC)
    red, green, blue = _densities(some_HWC, glass_RGB)
    strongest = np.maximum(np.maximum(red, green), blue)
    excess = np.maximum(green, blue) - red
    stained = (excess > MIN_TISSUE_DENSITY) & (excess > MIN_COLOURED_SHARE * strongest)
    if not stained.any():
        return _Usual(glass_RGB, 0.0, 0.0, 1.0)
    by_green = 1 / np.maximum(green[stained], 0.02)
    medians = (
        np.median(values) for values in (red[stained], red[stained] * by_green, blue[stained] * by_green)
    )
    return _Usual(glass_RGB, *map(float, medians))


def _densities(
    image_HWC: NDArray[np.uint8], glass_RGB: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Optical densities of red, green and blue, float32 [H, W] each; below 0 where it is brighter than the glass."""
    values = np.maximum(np.arange(256, dtype=np.float32), 1)
    red_HW, green_HW, blue_HW = (
        np.take(np.log10(glass / values), image_HWC[:, :, channel]) for channel, glass in enumerate(glass_RGB)
    )
    return red_HW, green_HW, blue_HW


def _classes(image_HWC: NDArray[np.uint8], usual: _Usual) -> NDArray[np.uint8]:
    """_GLASS, _STAINED, _INK or _RED_INK for each pixel by its colour alone; uint8 [H, W]."""
    red_HW, green_HW, blue_HW = _densities(image_HWC, usual.glass_RGB)
    green_or_blue_HW = np.maximum(green_HW, blue_HW)
    strongest_HW = np.maximum(red_HW, green_or_blue_HW)
    excess_HW = green_or_blue_HW - red_HW
    coloured_HW = excess_HW > MIN_COLOURED_SHARE * strongest_HW
    over_tissue_HW = (
        (red_HW > max(MIN_DARK_RED_DENSITY, usual.red + 0.25))
        & (excess_HW < MAX_DARK_COLOURED_SHARE * strongest_HW)
        & (np.abs(blue_HW - usual.blue_to_green * green_HW) > MAX_BLUE_TO_GREEN_CHANGE * green_HW)
    )
    red_ink_HW = (
        (np.minimum(green_HW, blue_HW) > MIN_RED_INK_BLUE * green_or_blue_HW)
        & (green_or_blue_HW > MIN_RED_INK_DENSITY)
        & (red_HW < min(MAX_RED_INK_RED, MAX_RED_INK_OF_USUAL * usual.red_to_green) * green_or_blue_HW)
    )
    class_HW = np.full(image_HWC.shape[:2], _GLASS, np.uint8)
    class_HW[(excess_HW > MIN_TISSUE_DENSITY) & coloured_HW] = _STAINED
    class_HW[((strongest_HW > MIN_INK_DENSITY) & ~coloured_HW) | over_tissue_HW] = _INK
    class_HW[red_ink_HW] = _RED_INK
    return class_HW


def _without_dust(
    mask_HW: NDArray[np.uint8], image_HWC: NDArray[np.uint8], usual: _Usual, um_per_px: float
) -> NDArray[np.bool_]:
    """Pieces that are large, or that have the colour of the large ones; bool [H, W]."""
    _, pieces_HW, statistics, _ = cv2.connectedComponentsWithStats(mask_HW, connectivity=8)
    area_um2 = statistics[:, cv2.CC_STAT_AREA] * um_per_px**2
    kept = area_um2 >= min(MIN_PIECE_UM2, mask_HW.size * um_per_px**2 / 4)
    kept[0] = False
    small = np.flatnonzero((area_um2 >= MIN_FRAGMENT_UM2) & ~kept)
    small = small[small > 0]
    if kept.any():
        for piece in small.tolist():
            left, top, width, height = statistics[piece, : cv2.CC_STAT_AREA].tolist()
            box = np.s_[top : top + height, left : left + width]
            inside_HW = pieces_HW[box] == piece
            red, green, blue = (
                density[inside_HW].mean() for density in _densities(image_HWC[box], usual.glass_RGB)
            )
            change = abs(float(blue) / max(float(green), 0.02) - usual.blue_to_green)
            kept[piece] = change < MAX_BLUE_TO_GREEN_CHANGE and red < green
    return np.asarray(kept[pieces_HW], np.bool_)


def _long_pieces(dark_HW: NDArray[np.uint8], length_px: float) -> NDArray[np.uint8]:
    """Connected pieces that are longer than that from corner to corner of their boxes; uint8 [H, W], 0 or 1."""
    _, pieces_HW, statistics, _ = cv2.connectedComponentsWithStats(dark_HW, connectivity=8)
    length = np.hypot(statistics[:, cv2.CC_STAT_WIDTH], statistics[:, cv2.CC_STAT_HEIGHT]) > length_px
    length[0] = False
    return np.asarray(length[pieces_HW], np.uint8)


def _disc(diameter_px: float) -> NDArray[np.uint8]:
    side_px = max(3, 2 * round((diameter_px - 1) / 2) + 1)
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side_px, side_px)), np.uint8)


def _glass_colour(image_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Colour of empty glass, float32 [3]: median of the brightest tenth, or white where nothing is bright."""
    darkest_HW = image_HWC.min(axis=2)
    counts = np.bincount(darkest_HW.ravel(), minlength=256)
    tenth = int(np.searchsorted(counts.cumsum(), 0.9 * darkest_HW.size))
    bright_HW = darkest_HW >= max(200, tenth)
    if not bright_HW.any():
        return np.full(3, 255, np.float32)
    return np.asarray(np.median(image_HWC[bright_HW], axis=0), np.float32)
