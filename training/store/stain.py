"""Stain normalisation of tiles by torchstain (its NumPy backend: no torch is loaded).

Macenko et al. 2009 (ISBI) find two stains in the optical density of a tile and set both to a reference; Reinhard et al.
2001 (IEEE CG&A) move mean and deviation of its colours in Lab space.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from slides.decode import decode_tile
from slides.errors import TileDecodeError
from training.errors import StoreError

REFERENCE_SIDE_PX = 512
MIN_DEVIATION = 1.0
"""A tile of one colour (0..255) holds no two stains."""
MAX_CHANGE = 100.0
"""A tile whose mean colour moves further (0..255) is no tile of two stains: the method has found something else."""


_FINDS_NOTHING = (ValueError, IndexError, FloatingPointError, np.linalg.LinAlgError)


class StainNormaliser:
    """Moves the colours of a tile to those of a reference.

    Args:
        method: "macenko" or "reinhard".
        reference: encoded image (JPEG or PNG) of well stained tissue; None takes torchstain's built-in one, which only
            Macenko's method has.

    Raises:
        StoreError: no usable reference.
    """

    def __init__(self, method: str, reference: bytes | None) -> None:
        from torchstain.base.normalizers import MacenkoNormalizer, ReinhardNormalizer

        self._method = method
        self._normaliser: Any = (MacenkoNormalizer if method == "macenko" else ReinhardNormalizer)(
            backend="numpy"
        )
        if reference is None:
            if method != "macenko":
                raise StoreError("stain normalisation", [f"{method} needs a --stain-reference"])
            return
        try:
            with _not_a_number_raises():
                self._normaliser.fit(decode_tile(reference, REFERENCE_SIDE_PX))
        except TileDecodeError as error:
            raise StoreError("stain reference", [str(error)]) from error
        except _FINDS_NOTHING as error:
            raise StoreError("stain reference", [f"{method} finds no stains in it: {error}"]) from error

    def __call__(self, tile_HWC: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """Uint8 [H, W, 3] RGB to the same, or None where the method finds no stains or turns the tile into another."""
        if max(cv2.meanStdDev(tile_HWC)[1].ravel()) < MIN_DEVIATION:
            return None
        try:
            with _not_a_number_raises():
                answer = self._normaliser.normalize(tile_HWC)
        except _FINDS_NOTHING:
            return None
        moved_HWC = np.ascontiguousarray(answer[0] if self._method == "macenko" else answer)
        if moved_HWC.dtype != np.uint8 or moved_HWC.shape != tile_HWC.shape:
            return None
        change_C = np.abs(np.subtract(cv2.mean(moved_HWC)[:3], cv2.mean(tile_HWC)[:3]))
        return moved_HWC if float(change_C.max()) <= MAX_CHANGE else None


@contextlib.contextmanager
def _not_a_number_raises() -> Iterator[None]:
    """A tile of glass has no stains: 0 / 0 would become some colour when it is cast to uint8."""
    with (
        warnings.catch_warnings(),
        np.errstate(divide="raise", invalid="raise", over="ignore", under="ignore"),
    ):
        warnings.simplefilter("ignore")
        yield


def read_reference(path: Path) -> bytes:
    """The encoded reference image; StoreError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(
            str(path), [f"the stain reference cannot be read: {error.strerror or error}"]
        ) from error
