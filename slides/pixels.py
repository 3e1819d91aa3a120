"""What a slide's format has to offer (`Pixels`), and what the formats share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

BLOCK_PIXELS = 2048 * 2048
"""A larger region is read and reduced in blocks of about this size."""

READ_THREADS = min(4, os.cpu_count() or 1)

PLAUSIBLE_UM_PER_PX = (0.02, 50.0)
"""Outside of it a resolution tag is a printer's (72 dpi = 353 um/px) or missing, not a microscope's."""

Item = TypeVar("Item")


class Pixels(Protocol):
    """Levels of one image, from the full resolution downwards, and rectangles of them.

    Attributes:
        level_sizes_px: width and height of each level.
        block_px: width and height of the blocks in which large regions are best read.
        um_per_px: micrometres per pixel of level 0 as the file states them, or None.
    """

    level_sizes_px: list[tuple[int, int]]
    block_px: tuple[int, int]
    um_per_px: float | None

    def read(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> NDArray[np.uint8]:
        """uint8 [height_px, width_px, 3] RGB from pixels of `level`; white outside. Thread-safe."""

    def overview(self, width_px: int, height_px: int) -> NDArray[np.uint8] | None:
        """Level 0 reduced to this size by a shortcut of the format, or None where it has none."""

    def close(self) -> None:
        """Close the file."""


def in_threads(work: Callable[[Item], None], items: Sequence[Item], title: str) -> None:
    """Do `work` for each item in READ_THREADS threads; on a terminal, after two seconds, a progress bar."""
    if len(items) == 1:
        work(items[0])
        return
    pool = ThreadPoolExecutor(READ_THREADS)
    try:
        results = pool.map(work, items)
        for _ in tqdm(results, total=len(items), desc=title, delay=2, disable=None, leave=False):
            pass
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def blend_on_white(image_HWC: NDArray[np.uint8], alpha_HW: NDArray[np.uint8]) -> None:
    """Composite straight (not premultiplied) RGB on white, in place."""
    alpha_HW1 = alpha_HW[:, :, None].astype(np.uint16)
    image_HWC[:] = (image_HWC * alpha_HW1 + 255 * (255 - alpha_HW1) + 127) // 255


def plausible_um_per_px(x: float, y: float) -> float | None:
    """The mean of both axes if they agree within 2% and a microscope could have made them, else None."""
    low, high = PLAUSIBLE_UM_PER_PX
    if not (low <= x <= high and low <= y <= high) or abs(x - y) > 0.02 * max(x, y):
        return None
    return (x + y) / 2
