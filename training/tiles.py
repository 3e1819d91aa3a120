"""Tiles for training: cut from slides or read as files, kept encoded, decoded as the server decodes them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
import sys
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from tqdm import tqdm

from slides.decode import decode_tile
from slides.errors import SlidesError
from slides.labels import SlideRecord
from slides.spec import ModelSpec
from training.errors import DataError


@dataclasses.dataclass(frozen=True)
class SlideTiles:
    """A slide and its tiles, encoded (JPEG, or PNG where the source is ready-cut tiles), at least one."""

    record: SlideRecord
    tiles: tuple[bytes, ...]


def collect_tiles(
    records: Sequence[SlideRecord],
    source: Literal["slides", "tiles"],
    spec: ModelSpec,
    *,
    show_progress: bool = True,
) -> list[SlideTiles]:
    """Tiles of every record, in the order of `records`, held in memory; as many slides are cut at a time as there are cores.

    Raises:
        DataError: naming every slide that has no usable tile, and why.
    """
    cut = _cut_slide if source == "slides" else _read_tile
    collected: list[SlideTiles] = []
    problems: list[str] = []
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=usable_cores())
    try:
        futures = [pool.submit(cut, record, spec) for record in records]
        paired = zip(records, futures, strict=True)
        for record, future in tqdm(
            paired, total=len(records), desc="tiles", unit="slide", file=sys.stderr, disable=not show_progress
        ):
            try:
                collected.append(SlideTiles(record, future.result()))
            except (SlidesError, OSError) as error:
                problems.append(f"{record.image_id}: {error}")
    finally:
        pool.shutdown(cancel_futures=True)
    if problems:
        raise DataError(f"{len(problems)} of {len(records)} slides cannot be used", problems)
    return collected


def usable_cores() -> int:
    """Cores that this process may use; all of the machine's where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cut_slide(record: SlideRecord, spec: ModelSpec) -> tuple[bytes, ...]:
    from slides.reader import open_slide  # openslide is not needed where tiles come ready cut
    from slides.tissue import iter_tiles

    with open_slide(record.path) as slide:
        return tuple(data for _, data in iter_tiles(slide, spec))


def _read_tile(record: SlideRecord, spec: ModelSpec) -> tuple[bytes, ...]:
    data = record.path.read_bytes()
    decode_tile(data, spec.input_size_px)  # a damaged tile is found now, not in the fifth epoch
    return (data,)


def fingerprint(slides: Sequence[SlideTiles]) -> str:
    """SHA-256 of what was learnt from: names, patients, labels and the bytes of every tile; order does not matter."""
    digest = hashlib.sha256()
    for slide in sorted(slides, key=lambda slide: slide.record.image_id):
        record = slide.record
        digest.update(
            "\0".join((record.image_id, record.patient_id, record.label, str(len(slide.tiles)))).encode()
        )
        for tile in slide.tiles:
            digest.update(hashlib.sha256(tile).digest())
    return digest.hexdigest()


class TileDataset(Dataset[tuple[torch.Tensor, int, int]]):
    """Decoded tiles: (uint8 [S, S, 3] RGB, index of the class, index of the tile).

    With `colour_jitter` tiles are also turned, mirrored and recoloured, by a generator that depends on seed, epoch
    and tile alone: neither the number of processes nor that of workers changes what an epoch shows.
    """

    def __init__(
        self,
        slides: Sequence[SlideTiles],
        spec: ModelSpec,
        *,
        colour_jitter: float | None = None,
        seed: int = 0,
    ) -> None:
        self.spec = spec
        self.colour_jitter = colour_jitter
        self.seed = seed
        self.epoch = 0
        self.tiles = [tile for slide in slides for tile in slide.tiles]
        self.slide_of_tile = [slide.record.image_id for slide in slides for _ in slide.tiles]
        self.labels = [spec.class_names.index(slide.record.label) for slide in slides for _ in slide.tiles]

    def set_epoch(self, epoch: int) -> None:
        """Called by Accelerate's loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        tile_HWC = decode_tile(self.tiles[index], self.spec.input_size_px)
        if self.colour_jitter is not None:
            generator = np.random.default_rng((self.seed, self.epoch, index))
            tile_HWC = augment(tile_HWC, self.colour_jitter, generator)
        return torch.from_numpy(tile_HWC), self.labels[index], index


def augment(
    tile_HWC: NDArray[np.uint8], colour_jitter: float, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """One of the eight symmetries of the square, a gain for each channel and a shift of brightness.

    Args:
        tile_HWC: uint8 [S, S, 3]; not changed.
        colour_jitter: 0..1, gains lie in 1 +- colour_jitter, the shift in +- colour_jitter of the range.

    Returns:
        uint8 [S, S, 3], C-contiguous.
    """
    turned_HWC = np.rot90(tile_HWC, k=int(generator.integers(4)))
    if generator.integers(2):
        turned_HWC = turned_HWC[:, ::-1]
    gain_C = generator.uniform(1 - colour_jitter, 1 + colour_jitter, size=3).astype(np.float32)
    shift = np.float32(255 * generator.uniform(-colour_jitter, colour_jitter))
    # Stained tissue is judged against white glass: the gain works on the distance from white.
    recoloured_HWC = 255 - (255 - turned_HWC.astype(np.float32)) * gain_C + shift
    return np.ascontiguousarray(np.clip(recoloured_HWC, 0, 255).astype(np.uint8))
