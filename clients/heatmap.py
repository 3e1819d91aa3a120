"""A heatmap: the thumbnail of a slide, each tile coloured by the probability of one class, or by its attention."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from clients.errors import HeatmapError
from clients.prediction import Prediction
from slides.reader import open_slide

THUMBNAIL_SIDE_PX = 1100
TEXTURE = 0.7
FRAME_SHADE = 0.65
MARGIN_PX = 24
TITLE_PX = 78
BAR_COLUMN_PX = 132
BAR_WIDTH_PX = 22
MIN_BODY_PX = (420, 300)  # width, height: room for title and colour bar beside the narrowest slide
INK = (32, 38, 46)
FAINT_INK = (98, 108, 120)


def write_heatmap(
    out: Path,
    slide_path: Path,
    prediction: Prediction,
    *,
    class_name: str | None = None,
    um_per_px: float | None = None,
) -> None:
    """Draw the heatmap of a prediction and write it as PNG (written aside, then renamed).

    Args:
        class_name: whose probability is drawn; by default the predicted class.

    Raises:
        HeatmapError: the class is unknown, or the file cannot be written.
        slides.errors.SlidesError: the slide cannot be read.
    """
    with open_slide(slide_path, um_per_px=um_per_px) as slide:
        thumbnail_HWC = slide.thumbnail(THUMBNAIL_SIDE_PX)
    image = Image.fromarray(draw_heatmap(thumbnail_HWC, prediction, class_name=class_name))
    aside = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out.parent, prefix=f".{out.name}.", delete=False) as stream:
            aside = Path(stream.name)
            image.save(stream, format="PNG")
        aside.chmod(0o644)
        os.replace(aside, out)
    except OSError as error:
        if aside is not None:
            aside.unlink(missing_ok=True)
        raise HeatmapError(f"cannot write the heatmap {out}: {error.strerror or error}") from error
    except BaseException:
        if aside is not None:
            aside.unlink(missing_ok=True)
        raise


def draw_heatmap(
    thumbnail_HWC: NDArray[np.uint8], prediction: Prediction, *, class_name: str | None = None
) -> NDArray[np.uint8]:
    """The heatmap with title and colour bar.

    Args:
        thumbnail_HWC: uint8 RGB [H, W, 3] of the whole slide.
        prediction: its tiles are placed by `slide_size_px`.
        class_name: whose probability is drawn; by default the predicted class. Where a slide classifier answered, tiles have
            no probabilities: then attention is drawn, as a share of the largest one.

    Returns:
        uint8 RGB, larger than the thumbnail by margins, title and bar. The thumbnail's pixel (0, 0) is at row
        `TITLE_PX`, column `MARGIN_PX`.

    Raises:
        HeatmapError: the class is not one of the prediction's.
    """
    name = prediction.label if class_name is None else class_name
    if name not in prediction.probabilities:
        known = ", ".join(prediction.probabilities)
        raise HeatmapError(f"heatmap of {prediction.image_id}: no class {name!r}; the model knows {known}")
    values_N, drawn = _values(prediction, name)
    body_HWC = _colour_tiles(thumbnail_HWC, prediction, values_N)
    height_px, width_px = body_HWC.shape[:2]
    body_width_px, body_height_px = max(width_px, MIN_BODY_PX[0]), max(height_px, MIN_BODY_PX[1])
    canvas = Image.new(
        "RGB",
        (MARGIN_PX + body_width_px + BAR_COLUMN_PX, TITLE_PX + body_height_px + MARGIN_PX),
        (255, 255, 255),
    )
    canvas.paste(Image.fromarray(body_HWC), (MARGIN_PX, TITLE_PX))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle(
        (MARGIN_PX - 1, TITLE_PX - 1, MARGIN_PX + width_px, TITLE_PX + height_px),
        outline=(210, 214, 220),
        width=1,
    )
    _draw_title(draw, prediction, canvas.width - 2 * MARGIN_PX)
    _draw_bar(canvas, drawn, MARGIN_PX + body_width_px + MARGIN_PX, body_height_px)
    return np.asarray(canvas)


def colours_of(values_N: NDArray[np.float64]) -> NDArray[np.uint8]:
    """RGB uint8 [N, 3] of values 0..1 on the viridis map (even steps look even, in grey and to colour-blind
    eyes)."""
    steps_N1 = np.clip(np.rint(np.asarray(values_N) * 255), 0, 255).astype(np.uint8).reshape(-1, 1)
    bgr_N13 = cv2.applyColorMap(steps_N1, cv2.COLORMAP_VIRIDIS)
    return np.ascontiguousarray(bgr_N13[:, 0, ::-1]).astype(np.uint8)


def _values(prediction: Prediction, name: str) -> tuple[NDArray[np.float64], str]:
    """What is drawn of each tile, 0..1, and what the bar calls it."""
    attention_N = np.array([tile.attention or 0.0 for tile in prediction.tiles], dtype=np.float64)
    if any(tile.attention is not None for tile in prediction.tiles):
        return attention_N / max(float(attention_N.max()), 1e-12), "attention"
    return np.array([tile.probabilities[name] for tile in prediction.tiles], dtype=np.float64), f"p({name})"


def _colour_tiles(
    thumbnail_HWC: NDArray[np.uint8], prediction: Prediction, values_N: NDArray[np.float64]
) -> NDArray[np.uint8]:
    body_HWC = thumbnail_HWC.copy()
    height_px, width_px = body_HWC.shape[:2]
    scale_x, scale_y = width_px / prediction.slide_size_px[0], height_px / prediction.slide_size_px[1]
    for tile, colour in zip(prediction.tiles, colours_of(values_N), strict=True):
        left, top = max(0, round(tile.x_px * scale_x)), max(0, round(tile.y_px * scale_y))
        right = min(width_px, max(left + 1, round((tile.x_px + tile.side_px) * scale_x)))
        bottom = min(height_px, max(top + 1, round((tile.y_px + tile.side_px) * scale_y)))
        if right <= left or bottom <= top:  # beyond the slide's edge
            continue
        square_HWC = body_HWC[top:bottom, left:right]
        square_HWC[:] = _tinted(square_HWC, colour)
        if right - left >= 12:  # a thin frame, so that neighbours of one colour are told apart
            square_HWC[0] = square_HWC[-1] = square_HWC[:, 0] = square_HWC[:, -1] = colour * FRAME_SHADE
    return body_HWC


def _tinted(tissue_HWC: NDArray[np.uint8], colour: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The colour, brighter and darker where the tissue is: on average exactly the colour, as on the bar.
    (Mixed with pink tissue it would be a colour that the bar does not have.)"""
    grey_HW = tissue_HWC.mean(axis=2)
    shade_HW = 1 + TEXTURE * (grey_HW / max(1.0, float(grey_HW.mean())) - 1)
    return np.clip(np.rint(shade_HW[..., None] * colour), 0, 255).astype(np.uint8)


def _draw_title(draw: ImageDraw.ImageDraw, prediction: Prediction, width_px: int) -> None:
    title = f"{prediction.image_id}: {prediction.label}, {_percent(prediction.confidence)}"
    facts = (
        f"patient {prediction.patient_id} \u00b7 {_per_class(prediction.probabilities)} \u00b7 "
        f"{len(prediction.tiles)} tiles \u00b7 {prediction.model} v{prediction.model_version}"
    )
    draw.text((MARGIN_PX, 16), _shortened(draw, title, 22, width_px), fill=INK, font=_font(22))
    draw.text((MARGIN_PX, 46), _shortened(draw, facts, 15, width_px), fill=FAINT_INK, font=_font(15))


def _draw_bar(canvas: Image.Image, drawn: str, left_px: int, body_height_px: int) -> None:
    draw = ImageDraw.Draw(canvas)
    top_px = TITLE_PX + 30
    height_px = min(320, body_height_px - 60)
    strip_HWC = np.repeat(colours_of(np.linspace(1, 0, height_px))[:, None, :], BAR_WIDTH_PX, axis=1)
    canvas.paste(Image.fromarray(strip_HWC), (left_px, top_px))
    draw.text(
        (left_px, TITLE_PX),
        _shortened(draw, drawn, 15, BAR_COLUMN_PX - MARGIN_PX),
        fill=INK,
        font=_font(15),
    )
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        y_px = top_px + round((1 - value) * (height_px - 1))
        draw.line((left_px + BAR_WIDTH_PX, y_px, left_px + BAR_WIDTH_PX + 5, y_px), fill=FAINT_INK)
        draw.text(
            (left_px + BAR_WIDTH_PX + 10, y_px), f"{value:g}", fill=FAINT_INK, font=_font(14), anchor="lm"
        )


def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)


def _shortened(draw: ImageDraw.ImageDraw, text: str, size_px: int, width_px: int) -> str:
    """The text, cut with an ellipsis where it would not fit into `width_px`."""
    if draw.textlength(text, font=_font(size_px)) <= width_px:
        return text
    while text and draw.textlength(text + "...", font=_font(size_px)) > width_px:
        text = text[:-1]
    return text + "..."


def _per_class(probabilities: Mapping[str, float]) -> str:
    return ", ".join(f"p({name}) {_percent(value)}" for name, value in probabilities.items())


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
