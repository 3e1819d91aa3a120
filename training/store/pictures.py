"""Two pictures a slide, so that a person can judge what was cut: an overlay and a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from slides.inspection import TILE_RGB, TISSUE_RGB
from slides.tissue import Overview, TileRef

OVERLAY_SIDE_PX = 1024
SHEET_TILES, SHEET_COLUMNS, SHEET_TILE_PX, SHEET_GAP_PX = 32, 8, 128, 4


def overlay(seen: Overview, tiles: Sequence[TileRef], slide_width_px: int) -> NDArray[np.uint8]:
    """Uint8 [H, W, 3] RGB: the slide, the outline of its tissue in orange, its tiles in green.

    Args:
        slide_width_px: width of the slide at level 0, where the tiles' coordinates are counted.
    """
    height_px, width_px = seen.thumbnail_HWC.shape[:2]
    scale = OVERLAY_SIDE_PX / max(height_px, width_px)
    size_px = (max(1, round(width_px * scale)), max(1, round(height_px * scale)))
    smaller = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    picture_HWC = np.asarray(cv2.resize(seen.thumbnail_HWC, size_px, interpolation=smaller), np.uint8)
    per_px = size_px[0] / slide_width_px
    for tile in tiles:
        left, top = round(tile.x_px * per_px), round(tile.y_px * per_px)
        right, bottom = round((tile.x_px + tile.side_px) * per_px), round((tile.y_px + tile.side_px) * per_px)
        cv2.rectangle(picture_HWC, (left, top), (max(left, right - 1), max(top, bottom - 1)), TILE_RGB, 1)
    mask_HW = cv2.resize(seen.mask_HW.astype(np.uint8), size_px, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(mask_HW, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(picture_HWC, contours, -1, TISSUE_RGB, 2)
    return picture_HWC


def on_sheet(tiles: int) -> dict[int, int]:
    """Which of so many tiles the contact sheet shows, evenly spaced: number of the tile -> its place."""
    shown = min(tiles, SHEET_TILES)
    return {(2 * place + 1) * tiles // (2 * shown): place for place in range(shown)}


def thumbnail(tile_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A tile as it is shown on the sheet, uint8 [SHEET_TILE_PX, SHEET_TILE_PX, 3]."""
    smaller = cv2.INTER_AREA if tile_HWC.shape[0] > SHEET_TILE_PX else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(tile_HWC, (SHEET_TILE_PX, SHEET_TILE_PX), interpolation=smaller), np.uint8)


def contact_sheet(thumbnails: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Uint8 [H, W, 3] RGB: the thumbnails in rows, richest in tissue first."""
    columns = min(SHEET_COLUMNS, max(1, len(thumbnails)))
    rows = max(1, math.ceil(len(thumbnails) / columns))
    step_px = SHEET_TILE_PX + SHEET_GAP_PX
    sheet_HWC = np.full((rows * step_px + SHEET_GAP_PX, columns * step_px + SHEET_GAP_PX, 3), 255, np.uint8)
    for place, tile_HWC in enumerate(thumbnails):
        top, left = (SHEET_GAP_PX + step_px * index for index in divmod(place, columns))
        sheet_HWC[top : top + SHEET_TILE_PX, left : left + SHEET_TILE_PX] = tile_HWC
    return sheet_HWC


def write_png(path: Path, picture_HWC: NDArray[np.uint8]) -> None:
    """Lightly compressed: a stronger level takes longer than cutting the tiles of a small slide."""
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    encoded, png = cv2.imencode(".png", cv2.cvtColor(picture_HWC, cv2.COLOR_RGB2BGR), options)
    if not encoded:
        raise OSError(f"{path}: the picture cannot be encoded as PNG")
    aside = path.with_name(f".{path.name}.partial")
    aside.write_bytes(png.tobytes())
    aside.replace(path)
