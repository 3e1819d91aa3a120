"""Tiles for training: cut from slides, read as files or taken from a store; encoded, and decoded as the server does."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from tqdm import tqdm

from slides.decode import decode_tile
from slides.errors import SlidesError
from slides.labels import SlideRecord
from slides.spec import ModelSpec
from training import stains
from training.errors import DataError
from training.processes import usable_cores

if TYPE_CHECKING:
    from training.store.reader import TileStore


@dataclasses.dataclass(frozen=True)
class SlideTiles:
    """A slide and its tiles, encoded (JPEG, or PNG where the source is ready-cut tiles), at least one."""

    record: SlideRecord
    tiles: Sequence[bytes]


class StoredTiles(Sequence[bytes]):
    """Tiles that lie in a store and are read when they are asked for."""

    def __init__(self, store: TileStore, rows: Sequence[int]) -> None:
        self._store = store
        self._rows = np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self._store.tile(int(row)) for row in self._rows[index]]
        return self._store.tile(int(self._rows[index]))


def of_store(store: TileStore, records: Sequence[SlideRecord], spec: ModelSpec) -> list[SlideTiles]:
    """Tiles of every record, in the order of `records`, without reading them.

    Raises:
        DataError: naming every slide that has no tile in the store.
    """
    rows = [rows_of_slide(store, record.image_id, spec) for record in records]
    missing = [record.image_id for record, own in zip(records, rows, strict=True) if not own]
    if missing:
        least = f"no tile with {100 * spec.min_tissue_share:.0f}% of tissue in the store"
        raise DataError("tile store", [f"{image_id}: {least}" for image_id in missing])
    return [SlideTiles(record, StoredTiles(store, own)) for record, own in zip(records, rows, strict=True)]


def rows_of_slide(store: TileStore, image_id: str, spec: ModelSpec) -> list[int]:
    """Rows of a store's index that stand for a slide: the ones that a client would send, most tissue first."""
    richest = store.richest(image_id, spec.tiles_per_slide)
    shares = store.index.column("tissue_share").take(richest).to_pylist()
    return [row for row, share in zip(richest, shares, strict=True) if share >= spec.min_tissue_share]


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

    Attributes:
        labels: class of each tile.
        slide_of_item: image_id of each tile.
    """

    def __init__(
        self,
        slides: Sequence[SlideTiles],
        spec: ModelSpec,
        *,
        colour_jitter: float | None = None,
        stain_augmentation: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.spec = spec
        self.colour_jitter = colour_jitter
        self.stain_augmentation = stain_augmentation
        self.seed = seed
        self.epoch = 0
        self._tiles_of_slide = [slide.tiles for slide in slides]
        self._end_of_slide = np.cumsum([len(slide.tiles) for slide in slides])
        self.slide_of_item = [slide.record.image_id for slide in slides for _ in range(len(slide.tiles))]
        self.labels = [
            spec.class_names.index(slide.record.label) for slide in slides for _ in range(len(slide.tiles))
        ]

    def set_epoch(self, epoch: int) -> None:
        """Decides, with seed and tile, how tiles are turned and recoloured from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, index: int) -> bytes:
        """The tile as it travels."""
        slide = int(np.searchsorted(self._end_of_slide, index, side="right"))
        tiles = self._tiles_of_slide[slide]
        return tiles[index - int(self._end_of_slide[slide]) + len(tiles)]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        tile_HWC = decode_tile(self.encoded(index), self.spec.input_size_px)
        if self.colour_jitter is not None:
            generator = np.random.default_rng((self.seed, self.epoch, index))
            if self.stain_augmentation:
                tile_HWC = stains.augment(tile_HWC, self.stain_augmentation, generator)
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
