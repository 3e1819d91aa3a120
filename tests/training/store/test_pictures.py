from __future__ import annotations

import cv2
import numpy as np

from slides.inspection import TILE_RGB, TISSUE_RGB
from slides.tissue import Overview, TileRef
from training.store import pictures
from training.store.reader import TileStore


def test_overlay_shows_tiles_and_tissue_where_they_are() -> None:
    mask_HW = np.zeros((150, 200), bool)
    mask_HW[40:100, 50:150] = True
    seen = Overview(np.full((150, 200, 3), 240, np.uint8), mask_HW)
    picture_HWC = pictures.overlay(seen, [TileRef(2000, 500, 1000, 1.0)], 4000)
    assert picture_HWC.shape == (768, 1024, 3)
    assert tuple(picture_HWC[128, 600]) == TILE_RGB
    assert tuple(picture_HWC[300, 512]) == TILE_RGB
    assert tuple(picture_HWC[205, 300]) == TISSUE_RGB
    assert tuple(picture_HWC[10, 10]) == (240, 240, 240)


def test_the_sheet_shows_evenly_spaced_tiles() -> None:
    assert pictures.on_sheet(3) == {0: 0, 1: 1, 2: 2}
    many = pictures.on_sheet(960)
    assert list(many.values()) == list(range(32))
    assert set(np.diff(list(many))) == {30}
    grey = [pictures.thumbnail(np.full((256, 256, 3), 5 * place, np.uint8)) for place in range(9)]
    sheet_HWC = pictures.contact_sheet(grey)
    assert sheet_HWC.shape == (268, 1060, 3)
    assert sheet_HWC[200, 60, 0] == 40
    assert sheet_HWC[60, 200, 0] == 5


def test_every_slide_has_both(store: TileStore) -> None:
    for record in store.slides:
        overlay_HWC = cv2.imread(str(store.path / "overlays" / f"{record.image_id}.png"))
        assert max(overlay_HWC.shape) == 1024
        assert cv2.imread(str(store.path / "contact_sheets" / f"{record.image_id}.png")).shape == (
            532,
            1060,
            3,
        )
        assert f"overlays/{record.image_id}.png" in (store.path / "report.html").read_text()
