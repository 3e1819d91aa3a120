from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from slides.inspection import TILE_RGB, TISSUE_RGB, draw_inspection
from slides.reader import open_slide
from slides.spec import ModelSpec
from slides.tissue import find_tiles


def test_tissue_is_outlined_and_tiles_are_framed(demo_slide: Path, spec: ModelSpec) -> None:
    with open_slide(demo_slide) as slide:
        picture_png, facts = draw_inspection(slide, spec, 1024)
        tile = find_tiles(slide, spec)[0]
    picture_HWC = cv2.imdecode(np.frombuffer(picture_png, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
    assert picture_HWC.shape == (768, 1024, 3)
    assert (picture_HWC == TISSUE_RGB).all(axis=2).sum() > 100
    assert tuple(picture_HWC[tile.y_px // 2, tile.x_px // 2 + 32]) == TILE_RGB
    assert facts["tiles"] == 6
    assert 0.05 < facts["tissue_share"] < 0.8
    assert facts["size_px"] == [2048, 1536]


def test_a_slide_without_tissue_is_drawn_all_the_same(demo_slide: Path, spec: ModelSpec) -> None:
    wanting = ModelSpec.from_dict(spec.as_dict() | {"tile_size_px": 4096, "min_tissue_share": 1.0})
    with open_slide(demo_slide) as slide:
        _, facts = draw_inspection(slide, wanting, 256)
    assert facts["tiles"] == 0
