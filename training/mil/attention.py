"""Where a slide checkpoint looks: attention of tiles, with the places that they were cut from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from training.mil.bags import Places, SlideBag, evaluation_rows
from training.mil.checkpoint import SlideCheckpoint


@dataclasses.dataclass(frozen=True)
class SlideAttention:
    """The answer to one slide, and what it is made of.

    Attributes:
        probabilities_K: FP32 [K].
        rows_T: int64 [T], the tiles of the slide that are in the bag.
        attention_T: FP32 [T], of these tiles; it sums to 1.
        places: of these tiles; None where nobody knows them.
    """

    image_id: str
    probabilities_K: NDArray[np.float32]
    rows_T: NDArray[np.int64]
    attention_T: NDArray[np.float32]
    places: Places | None


def of_slides(
    checkpoint: SlideCheckpoint, bags: Sequence[SlideBag], *, every_tile: bool = False
) -> Iterator[SlideAttention]:
    """The answers of a checkpoint to slides, one at a time, in memory for a few tiles.

    Args:
        every_tile: False: the bag by which the slide is judged; True: all of its tiles as one bag, for a map without
            holes. The probabilities are then those of that larger bag.

    Raises:
        TileDecodeError: a tile is no JPEG or PNG.
    """
    for bag in bags:
        rows_T = (
            np.arange(len(bag.tiles), dtype=np.int64) if every_tile else evaluation_rows(bag, checkpoint.bags)
        )
        answer = checkpoint.answer([bag.tiles[int(row)] for row in rows_T])
        places = bag.places
        if places is not None:
            places = Places(places.x_px_T[rows_T], places.y_px_T[rows_T], places.side_px_T[rows_T])
        yield SlideAttention(bag.record.image_id, answer.probabilities_K, rows_T, answer.attention_T, places)
