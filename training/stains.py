"""Augmentation of stains with torchstain: as if the laboratory had taken more of one stain and less of another."""

from __future__ import annotations

import threading
import warnings

import numpy as np
from numpy.typing import NDArray

_NUMPYS_OWN_GENERATOR = threading.Lock()


def augment(
    tile_HWC: NDArray[np.uint8], largest_change: float, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """A tile with other amounts of its two stains, found by Macenko et al. 2009 (torchstain's augmentor).

    Args:
        tile_HWC: uint8 [H, W, 3]; not changed.
        largest_change: 0..1, each stain is multiplied by a factor in 1 +- largest_change. Glass stays glass.
        generator: decides the factors.

    Returns:
        uint8 [H, W, 3]; the tile itself where it holds too little stain to tell two of them apart.
    """
    from torchstain.numpy.augmentors import NumpyMacenkoAugmentor

    augmentor = NumpyMacenkoAugmentor(sigma1=largest_change, sigma2=0.0)
    seed = int(generator.integers(2**32))
    with _NUMPYS_OWN_GENERATOR, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        # torchstain draws from the generator of the process, which the rest of training must not notice.
        state = np.random.get_state()
        np.random.seed(seed)
        try:
            augmentor.fit(tile_HWC)
            changed_HWC: NDArray[np.uint8] = augmentor.augment()
        except (np.linalg.LinAlgError, ValueError, IndexError):
            return tile_HWC
        finally:
            np.random.set_state(state)
    return changed_HWC
