"""Pictures of single slides: where a model looked, and its worst errors with their tiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from slides.decode import decode_tile
from slides.errors import SlidesError
from training.evaluation.plots import COLOURS, FAINT, png, style
from training.evaluation.prediction import SlideAnswer
from training.evaluation.sources import Places, Source

THUMBNAIL_SIDE_PX = 900
MOSAIC_TILE_PX = 48
SHOWN_TILES = 6
SHOWN_TILE_PX = 224
BETWEEN_CLASSES = LinearSegmentedColormap.from_list("between classes", [COLOURS[0], "#f4f1ec", COLOURS[1]])


@dataclasses.dataclass(frozen=True)
class _Ground:
    """What tiles are drawn on.

    Attributes:
        image_HWC: the whole slide, reduced.
        size_px: width and height of level 0.
        places: of the tiles that the answer is made of.
        scale, unit: length of a pixel of level 0 on the axes, and the unit of the axes.
    """

    image_HWC: NDArray[np.uint8]
    size_px: tuple[int, int]
    places: Places
    scale: float
    unit: str

    @property
    def extent(self) -> tuple[float, float, float, float]:
        return (0, self.size_px[0] * self.scale, self.size_px[1] * self.scale, 0)

    def squares(self) -> list[Rectangle]:
        places, scale = self.places, self.scale
        return [
            Rectangle((x_px * scale, y_px * scale), side_px * scale, side_px * scale)
            for x_px, y_px, side_px in zip(places.x_px, places.y_px, places.side_px, strict=True)
        ]


def heatmap(answer: SlideAnswer, class_names: Sequence[str], source: Source) -> bytes | None:
    """The slide as it is, and beside it its tiles coloured by what the model made of them; None for ready-cut tiles.

    Raises:
        SlidesError, TrainingError, OSError: the slide cannot be read.
    """
    if answer.places is None:
        return None
    ground = _ground(answer, answer.places, source)
    width_px, height_px = ground.size_px
    body_in = float(np.clip(4.75 * height_px / width_px, 2.2, 7.0))
    with style():
        figure = Figure(
            figsize=(min(11.0, 2.2 * body_in * width_px / height_px + 1.6), body_in + 0.9),
            layout="constrained",
        )
        left, right = figure.subplots(1, 2, sharex=True, sharey=True)
        left.imshow(ground.image_HWC, extent=ground.extent)
        left.add_collection(
            PatchCollection(ground.squares(), facecolor="none", edgecolor="#111111", linewidth=0.7)
        )
        left.set_title("tiles that were used", fontsize=10.5, fontweight="normal")
        _axes_of_a_slide(left, ground.unit)
        _draw_tiles(figure, right, answer, class_names, ground)
        right.tick_params(labelleft=False)
        right.set_ylabel("")
        return png(figure)


def error(answer: SlideAnswer, class_names: Sequence[str], source: Source) -> bytes:
    """A wrong answer: its heatmap, and the tiles that speak for it most.

    Raises:
        SlidesError, TrainingError, OSError: the slide cannot be read.
    """
    chosen, captions = telling_tiles(answer, class_names, SHOWN_TILES)
    rows = answer.tiles.rows_T[chosen].tolist()
    tiles = source.tiles_again(answer.slide, rows, answer.candidates[0].spec)
    with style():
        if answer.places is None:
            figure = Figure(figsize=(2.6, 2.6), layout="constrained")
            _show_tile(figure.subplots(), tiles[0], "")
            return png(figure)
        figure = Figure(figsize=(11.6, 4.7), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1.12, 1), squeeze=False)[0]
        ground = _ground(answer, answer.places, source)
        _draw_tiles(left, left.subplots(), answer, class_names, ground)
        panels = right.subplots(2, SHOWN_TILES // 2).ravel()
        for axes in panels:
            axes.axis("off")
        for axes, tile, caption in zip(panels, tiles, captions, strict=False):
            _show_tile(axes, tile, caption)
        return png(figure)


def telling_tiles(
    answer: SlideAnswer, class_names: Sequence[str], count: int
) -> tuple[NDArray[np.int64], list[str]]:
    """Tiles with the highest attention, or the highest probability of the answered class, and a caption each.

    Returns:
        places in `answer.tiles.rows_T`, most telling first, and their captions.
    """
    told = answer.tiles
    if told.tile_probabilities_TK is not None:
        k = int(answer.probabilities_K.argmax())
        order = np.argsort(-told.tile_probabilities_TK[:, k], kind="stable")[:count]
        return order, [f"p({class_names[k]}) {told.tile_probabilities_TK[place, k]:.2f}" for place in order]
    attention_T = _attention(answer)
    order = np.argsort(-attention_T, kind="stable")[:count]
    return order, [f"attention {attention_T[place]:.1f} x" for place in order]


def values_of(
    answer: SlideAnswer, class_names: Sequence[str]
) -> tuple[NDArray[np.floating], Colormap, Normalize, str]:
    """What tiles are coloured by: one value a tile, the map, its range and the label of its bar."""
    probabilities_TK, viridis = answer.tiles.tile_probabilities_TK, matplotlib.colormaps["viridis"]
    if probabilities_TK is None:
        times_T = _attention(answer)
        top = max(2.0, float(times_T.max()))
        return times_T, viridis, Normalize(0, top), "attention (1 = equal share)"
    if len(class_names) == 2:
        label = f"p({class_names[1]}):  0 = {class_names[0]},  1 = {class_names[1]}"
        return probabilities_TK[:, 1], BETWEEN_CLASSES, Normalize(0, 1), label
    k = int(answer.probabilities_K.argmax())
    return probabilities_TK[:, k], viridis, Normalize(0, 1), f"p({class_names[k]}), the answered class"


def _attention(answer: SlideAnswer) -> NDArray[np.float32]:
    """Attention in equal shares: 1 where every tile would weigh the same."""
    attention_T, count = answer.tiles.attention_T, len(answer.tiles.rows_T)
    return np.ones(count, np.float32) if attention_T is None else attention_T * count


def _ground(answer: SlideAnswer, places: Places, source: Source) -> _Ground:
    """The slide's thumbnail; without the slide's file, a mosaic of the store's tiles."""
    from slides.reader import open_slide

    um_per_px = answer.slide.um_per_px
    scale, unit = (1.0, "pixels of level 0") if um_per_px is None else (um_per_px / 1000, "mm")
    try:
        with open_slide(answer.record.path) as slide:
            return _Ground(slide.thumbnail(THUMBNAIL_SIDE_PX), slide.size_px, places, scale, unit)
    except SlidesError:
        if source.store is None:
            raise
    image_HWC, size_px = _mosaic(answer, places, source)
    return _Ground(image_HWC, size_px, places, scale, unit)


def _mosaic(answer: SlideAnswer, places: Places, source: Source) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """The tiles at their places on blank glass, and the width and height of level 0 that they span."""
    width_px, height_px = (int((axis + places.side_px).max()) for axis in (places.x_px, places.y_px))
    scale = min(MOSAIC_TILE_PX / int(places.side_px[0]), THUMBNAIL_SIDE_PX / max(width_px, height_px))
    shape_HWC = (max(1, round(height_px * scale)), max(1, round(width_px * scale)), 3)
    canvas_HWC = np.full(shape_HWC, 244, np.uint8)
    rows = answer.tiles.rows_T.tolist()
    tiles = source.tiles_again(answer.slide, rows, answer.candidates[0].spec)
    for tile, x_px, y_px, side_px in zip(tiles, places.x_px, places.y_px, places.side_px, strict=True):
        left, top = round(x_px * scale), round(y_px * scale)
        target_HWC = canvas_HWC[
            top : top + max(1, round(side_px * scale)), left : left + max(1, round(side_px * scale))
        ]
        side = max(target_HWC.shape[:2])
        if target_HWC.size:
            target_HWC[:] = decode_tile(tile, side)[: target_HWC.shape[0], : target_HWC.shape[1]]
    return canvas_HWC, (width_px, height_px)


def _draw_tiles(
    figure: Figure | SubFigure,
    axes: Axes,
    answer: SlideAnswer,
    class_names: Sequence[str],
    ground: _Ground,
) -> None:
    grey_HW = cv2.cvtColor(ground.image_HWC, cv2.COLOR_RGB2GRAY)
    axes.imshow(grey_HW, cmap="gray", vmin=0, vmax=255, extent=ground.extent)
    values_T, colours, norm, label = values_of(answer, class_names)
    squares = PatchCollection(
        ground.squares(), cmap=colours, norm=norm, alpha=0.78, edgecolor="#111111", linewidth=0.5
    )
    squares.set_array(values_T)
    axes.add_collection(squares)
    bar = figure.colorbar(squares, ax=axes, shrink=0.86, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)  # type: ignore[operator]
    kind = "probability by tile" if answer.tiles.attention_T is None else "attention by tile"
    axes.set_title(kind, fontsize=10.5, fontweight="normal")
    _axes_of_a_slide(axes, ground.unit)


def _axes_of_a_slide(axes: Axes, unit: str) -> None:
    axes.grid(False)
    axes.set(xlabel=unit, ylabel=unit)
    axes.tick_params(length=2.5, colors=FAINT, labelsize=9)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color("#c4ccd4")


def _show_tile(axes: Axes, tile: bytes, caption: str) -> None:
    axes.imshow(decode_tile(tile, SHOWN_TILE_PX))
    axes.axis("off")
    axes.set_title(caption, fontsize=10, fontweight="normal", loc="center", pad=3)
