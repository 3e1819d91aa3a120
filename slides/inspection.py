"""A picture of what the tissue finder sees on a slide."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from slides.errors import NoTissueError, SlidesError
from slides.reader import Slide
from slides.spec import ModelSpec
from slides.tissue import TileRef, find_tiles, overview

TISSUE_RGB = (255, 170, 0)
TILE_RGB = (0, 200, 0)


def draw_inspection(slide: Slide, spec: ModelSpec, side_px: int) -> tuple[bytes, dict[str, Any]]:
    """Thumbnail with the outline of tissue (orange) and the chosen tiles (green).

    Args:
        side_px: longer side of the picture.

    Returns:
        PNG bytes, and facts for people and scripts: size_px, um_per_px, levels, tissue_share, tiles.

    Raises:
        ResolutionUnknownError, SlideFileError: as `find_tiles`; a slide without tissue is drawn, not refused.
    """
    thumbnail_HWC = slide.thumbnail(side_px)
    seen = overview(slide, spec)
    mask_HW = seen.mask_HW
    try:
        tiles: list[TileRef] = find_tiles(slide, spec, seen)
    except NoTissueError:
        tiles = []
    height_px, width_px = thumbnail_HWC.shape[:2]
    outline_HW = cv2.resize(mask_HW.astype(np.uint8), (width_px, height_px), interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(outline_HW, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(thumbnail_HWC, contours, -1, TISSUE_RGB, 2)
    scale = width_px / slide.size_px[0]
    for tile in tiles:
        corner = (round(tile.x_px * scale), round(tile.y_px * scale))
        opposite = (round((tile.x_px + tile.side_px) * scale), round((tile.y_px + tile.side_px) * scale))
        cv2.rectangle(thumbnail_HWC, corner, opposite, TILE_RGB, 2)
    encoded, picture_png = cv2.imencode(".png", cv2.cvtColor(thumbnail_HWC, cv2.COLOR_RGB2BGR))
    if not encoded:
        raise SlidesError(f"{slide.path}: the picture cannot be encoded as PNG")
    facts = {
        "slide": str(slide.path),
        "size_px": list(slide.size_px),
        "um_per_px": slide.um_per_px,
        "levels": slide.level_count,
        "tissue_share": round(float(mask_HW.mean()), 4),
        "tiles": len(tiles),
    }
    return picture_png.tobytes(), facts
