"""training/stains.py"""

from __future__ import annotations

import numpy as np

from training import stains


def stained() -> np.ndarray:
    generator = np.random.default_rng(0)
    concentrations = generator.uniform(0.2, 1.2, (64 * 64, 2))
    colours = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
    light = 240 * np.exp(-concentrations @ colours)
    tile_HWC = np.clip(light, 0, 255).astype(np.uint8).reshape(64, 64, 3)
    tile_HWC[:8] = 250  # glass
    return tile_HWC


def test_amounts_of_stain_change_and_glass_does_not() -> None:
    tile_HWC = stained()
    before = tile_HWC.copy()
    changed_HWC = stains.augment(tile_HWC, 0.5, np.random.default_rng(1))
    assert np.array_equal(tile_HWC, before)
    assert changed_HWC.dtype == np.uint8
    assert changed_HWC.shape == tile_HWC.shape
    assert np.abs(changed_HWC[8:].astype(int) - before[8:]).mean() > 3
    assert np.abs(changed_HWC[:8].astype(int) - before[:8]).max() < 20
    unchanged_HWC = stains.augment(tile_HWC, 0.0, np.random.default_rng(1))
    assert np.abs(unchanged_HWC[8:].astype(int) - before[8:]).mean() < 3


def test_only_the_given_generator_decides() -> None:
    np.random.seed(7)
    state = np.random.get_state()[1].copy()
    one = stains.augment(stained(), 0.3, np.random.default_rng(4))
    assert np.array_equal(np.random.get_state()[1], state), "the process's own generator is left alone"
    np.random.seed(8)
    assert np.array_equal(one, stains.augment(stained(), 0.3, np.random.default_rng(4)))
    assert not np.array_equal(one, stains.augment(stained(), 0.3, np.random.default_rng(5)))


def test_tiles_without_two_stains_are_not_spoilt() -> None:
    glass_HWC = np.full((16, 16, 3), 255, np.uint8)
    assert np.array_equal(stains.augment(glass_HWC, 0.5, np.random.default_rng(0)), glass_HWC)
    for value in (200, 128, 0):
        grey_HWC = np.full((16, 16, 3), value, np.uint8)
        changed_HWC = stains.augment(grey_HWC, 0.1, np.random.default_rng(0))
        assert np.abs(changed_HWC.astype(int) - value).max() < 40
