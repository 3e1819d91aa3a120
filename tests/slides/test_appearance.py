"""What a tile's statistics see, what they do not, and what they cost."""

from __future__ import annotations

import itertools
import time

import cv2
import numpy as np
import pytest

from slides.appearance import CONFIDENCE_EDGES, STATISTICS, appearance
from slides.decode import decode_tile, encode_tile
from slides.demo_render import EOSIN, HAEMATOXYLIN

SIZE_PX = 224


def stained(stain_RGB: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Tissue of this stain by Beer and Lambert's law, with structures of a few pixels."""
    noise = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=(SIZE_PX, SIZE_PX)), (0, 0), 1.5)
    density = np.clip(1 + 0.3 * noise / noise.std(), 0, 3)
    return np.round(245 * np.exp(-density[..., np.newaxis] * stain_RGB)).astype(np.uint8)


@pytest.mark.parametrize("edges", [*STATISTICS.values(), CONFIDENCE_EDGES])
def test_edges_rise_within_0_to_1(edges: tuple[float, ...]) -> None:
    assert edges[0] > 0
    assert edges[-1] <= 1
    assert all(before < after for before, after in itertools.pairwise(edges))


@pytest.mark.parametrize("shape", [(224, 224, 3), (223, 300, 3), (8, 8, 3), (2, 2, 3), (512, 448, 3)])
def test_any_size_has_every_statistic_as_a_python_number(shape: tuple[int, int, int]) -> None:
    tile_HWC = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    values = appearance(tile_HWC)
    assert list(values) == list(STATISTICS)
    assert all(type(value) is float and 0 <= value <= 1 for value in values.values())
    assert values == appearance(tile_HWC.copy())


def test_plain_colours_have_the_values_of_the_definitions() -> None:
    tile_HWC = np.empty((224, 224, 3), np.uint8)
    tile_HWC[:] = (255, 102, 51)
    values = appearance(tile_HWC)
    density = -np.log((np.array([255, 102, 51]) + 1) / 256)
    assert values["brightness"] == pytest.approx(408 / 765)
    assert values["saturation"] == pytest.approx(204 / 255)
    assert values["red_density_share"] == pytest.approx(density[0] / density.sum())
    assert values["sharpness"] == 0
    assert appearance(np.full((224, 224, 3), 255, np.uint8))["red_density_share"] == 0


def test_stripes_are_as_sharp_as_their_step() -> None:
    tile_HWC = np.zeros((224, 224, 3), np.uint8)
    tile_HWC[:, ::2] = 51
    assert appearance(tile_HWC)["sharpness"] == pytest.approx(51 / 255)


def test_haematoxylin_is_told_from_eosin() -> None:
    eosin, haematoxylin = (appearance(stained(stain))["red_density_share"] for stain in (EOSIN, HAEMATOXYLIN))
    assert eosin < 0.2 < haematoxylin


def test_blur_and_compression_are_seen() -> None:
    tile_HWC = stained(EOSIN)
    sharp = appearance(tile_HWC)["sharpness"]
    assert appearance(cv2.GaussianBlur(tile_HWC, (0, 0), 2))["sharpness"] < 0.7 * sharp
    assert appearance(decode_tile(encode_tile(tile_HWC, 5), SIZE_PX))["sharpness"] < 0.9 * sharp


def test_another_piece_of_the_same_tissue_looks_the_same() -> None:
    one, other = (appearance(stained(EOSIN, seed=seed)) for seed in (1, 2))
    for name in STATISTICS:
        assert one[name] == pytest.approx(other[name], rel=0.1)


def test_the_grid_stands_for_all_pixels() -> None:
    tile_HWC = stained(EOSIN)
    density = -np.log((tile_HWC.astype(float) + 1) / 256).sum((0, 1))
    whole = {
        "brightness": tile_HWC.mean() / 255,
        "saturation": (tile_HWC.max(2) - tile_HWC.min(2)).mean() / 255,
        "red_density_share": density[0] / density.sum(),
        "sharpness": np.abs(np.diff(tile_HWC[..., 1].astype(int))).mean() / 255,
    }
    assert appearance(tile_HWC) == pytest.approx(whole, rel=0.1)


def test_it_costs_less_than_a_tenth_of_decoding() -> None:
    tile_HWC = stained(EOSIN)
    encoded = encode_tile(cv2.resize(tile_HWC, (512, 512)), 90)

    def fastest_s(call: object) -> float:
        times = []
        for _ in range(60):
            start = time.perf_counter()
            call()  # type: ignore[operator]
            times.append(time.perf_counter() - start)
        return min(times)

    assert fastest_s(lambda: appearance(tile_HWC)) < 0.1 * fastest_s(lambda: decode_tile(encoded, SIZE_PX))
