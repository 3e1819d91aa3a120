from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clients.errors import HeatmapError
from clients.heatmap import MARGIN_PX, TITLE_PX, colours_of, draw_heatmap, write_heatmap
from clients.prediction import Prediction
from slides.errors import SlideFileError

GREY = np.full((400, 800, 3), 200, np.uint8)  # a fifth of the slide's size


def body(image_HWC: np.ndarray) -> np.ndarray:
    return image_HWC[TITLE_PX : TITLE_PX + 400, MARGIN_PX : MARGIN_PX + 800]


def test_tiles_take_their_colour_where_they_lie(prediction: Prediction) -> None:
    body_HWC = body(draw_heatmap(GREY, prediction, class_name="CE"))
    for tile in prediction.tiles:
        colour = colours_of(np.array([tile.probabilities["CE"]]))[0]
        left, top = tile.x_px // 5, tile.y_px // 5
        square_HWC = body_HWC[top : top + 100, left : left + 100]
        np.testing.assert_array_equal(square_HWC[1:-1, 1:-1], np.broadcast_to(colour, (98, 98, 3)))
        assert (square_HWC[0].sum() + square_HWC[:, -1].sum()) < 200 * int(colour.sum())  # a darker frame
    outside = np.ones((400, 800), bool)
    outside[100:200, 100:400] = outside[100:200, 600:700] = False
    assert (body_HWC[outside] == 200).all()


def test_texture_is_seen_through_the_colour(prediction: Prediction) -> None:
    striped_HWC = GREY.copy()
    striped_HWC[::2] = 100
    tile_HWC = body(draw_heatmap(striped_HWC, prediction, class_name="CE"))[110:190, 310:390].astype(float)
    colour = colours_of(np.array([0.75]))[0]
    np.testing.assert_allclose(tile_HWC.mean(axis=(0, 1)), colour, atol=1)
    assert (tile_HWC[1::2].mean() - tile_HWC[::2].mean()) > 20


def test_the_class_decides_the_colours(prediction: Prediction) -> None:
    ce_HWC, laa_HWC = (body(draw_heatmap(GREY, prediction, class_name=name)) for name in ("CE", "LAA"))
    np.testing.assert_array_equal(ce_HWC[150, 150], laa_HWC[150, 650])  # 0 for one is 1 for the other
    assert (ce_HWC[150, 150] != ce_HWC[150, 650]).any()
    np.testing.assert_array_equal(body(draw_heatmap(GREY, prediction)), ce_HWC)  # the predicted class


def test_colours_grow_brighter() -> None:
    brightness = colours_of(np.linspace(0, 1, 9)).astype(float) @ [0.299, 0.587, 0.114]
    assert (np.diff(brightness) > 0).all()


def test_a_tiny_thumbnail_and_endless_names_still_have_their_frame(prediction: Prediction) -> None:
    long = dataclasses.replace(prediction, image_id="x" * 500, model="m" * 300)
    image_HWC = draw_heatmap(np.full((5, 10, 3), 200, np.uint8), long)
    assert image_HWC.shape[1] < 700
    assert image_HWC.shape[0] > 300


def test_an_unknown_class_is_refused(prediction: Prediction) -> None:
    with pytest.raises(HeatmapError, match="no class 'WBC'; the model knows CE, LAA"):
        draw_heatmap(GREY, prediction, class_name="WBC")


def test_the_file_is_a_png_and_nothing_is_left_beside_it(
    slide_path: Path, prediction: Prediction, tmp_path: Path
) -> None:
    out = tmp_path / "new folder" / "heat.png"
    write_heatmap(out, slide_path, dataclasses.replace(prediction, slide_size_px=(2560, 2560)))
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.width > 900
    assert [entry.name for entry in out.parent.iterdir()] == ["heat.png"]


def test_what_cannot_be_written_is_an_error_of_ours(
    slide_path: Path, prediction: Prediction, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(HeatmapError, match="cannot write the heatmap"):
        write_heatmap(tmp_path / "file" / "heat.png", slide_path, prediction)
    (tmp_path / "heat.png").mkdir()
    with pytest.raises(HeatmapError, match="cannot write the heatmap"):
        write_heatmap(tmp_path / "heat.png", slide_path, prediction)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "heat.png"]


def test_a_missing_slide_is_told_as_such(prediction: Prediction, tmp_path: Path) -> None:
    with pytest.raises(SlideFileError):
        write_heatmap(tmp_path / "heat.png", tmp_path / "none.tif", prediction)
