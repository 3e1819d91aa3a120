"""How a tile looks, in four numbers: what sees another stain, another scanner, blur or stronger compression.

    brightness          0..1  mean of red, green and blue
    saturation          0..1  mean over the pixels of (largest - smallest of red, green and blue)
    red_density_share   0..1  optical density in red, as a share of that in red, green and blue together. It tells
                              haematoxylin (0.40) from eosin (0.06): stain vectors of Ruifrok and Johnston (2001),
                              "Quantification of histochemical staining by color deconvolution"
    sharpness           0..1  mean difference of green between neighbours in a row: blur and compression make it smaller

Serving counts them into histograms with the edges of STATISTICS, and a release's reference profile has the same edges
(`docs/drift.md`). They are taken of a grid of pixels, so a tile costs some ten microseconds. Needs numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

STATISTICS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "brightness": (
            *(0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6),
            *(0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95),
        ),
        "saturation": (
            *(0.02, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.175),
            *(0.2, 0.225, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6),
        ),
        "red_density_share": (
            *(0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18),
            *(0.2, 0.22, 0.25, 0.28, 0.31, 0.34, 0.38, 0.45),
        ),
        "sharpness": (
            *(0.002, 0.003, 0.004, 0.006, 0.008, 0.011, 0.015, 0.02),
            *(0.025, 0.03, 0.04, 0.05, 0.065, 0.085, 0.11, 0.15),
        ),
    }
)
"""Statistic -> upper edges of its histogram's buckets, without +Inf."""

CONFIDENCE_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99, 1.0)
"""Upper edges of the histogram of a prediction's confidence, without +Inf."""

_GRID = 28
"""Pixels a side that are looked at: 784 of a tile."""

_DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)
"""Grey level -> natural optical density; of white, 0."""


def appearance(tile_HWC: NDArray[np.uint8]) -> dict[str, float]:
    """The four statistics of a tile.

    Args:
        tile_HWC: uint8 [H, W, 3], RGB, both sides two pixels or more.

    Returns:
        A value for every key of STATISTICS, in its order.
    """
    height_px, width_px, _ = tile_HWC.shape
    down, across = max(1, height_px // _GRID), max(1, width_px // _GRID)
    top, left = down // 2, across // 2
    red, green, blue = np.ascontiguousarray(
        tile_HWC[top::down, left : width_px - 1 : across].transpose(2, 0, 1)
    )
    right = tile_HWC[top::down, left + 1 :: across, 1]
    largest = np.maximum(np.maximum(red, green), blue)
    smallest = np.minimum(np.minimum(red, green), blue)
    difference = np.maximum(green, right) - np.minimum(green, right)
    sums = [int(channel.sum()) for channel in (red, green, blue)]
    densities = [float(_DENSITY.take(channel).sum()) for channel in (red, green, blue)]
    scale = 1 / (255 * red.size)
    return {
        "brightness": sum(sums) * scale / 3,
        "saturation": int((largest - smallest).sum()) * scale,
        "red_density_share": densities[0] / (sum(densities) + 1e-9),
        "sharpness": int(difference.sum()) * scale,
    }
