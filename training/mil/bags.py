"""Slides as bags of tiles: where the tiles are, which of them make the bag, and datasets of bags."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from tqdm import tqdm

from slides.decode import decode_tile
from slides.errors import SlidesError
from slides.labels import SlideRecord
from slides.spec import ModelSpec
from training import stains, tiles
from training.errors import DataError
from training.mil.options import BagOptions
from training.processes import usable_cores

if TYPE_CHECKING:
    from training.store.reader import TileStore

_DARKNESS_SIDE_PX = 32


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the tiles of a slide were cut, in pixels of its level 0: int64 [T] each."""

    x_px_T: NDArray[np.int64]
    y_px_T: NDArray[np.int64]
    side_px_T: NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class SlideBag:
    """A slide and all of its tiles; a bag that is learnt from or judged is a choice of them.

    Attributes:
        tiles: encoded, at least one; read when they are asked for where they lie in a store.
        darkness_T: FP64 [T], mean optical density of each tile, see `slides.tissue.TileRef`.
        places: None where nobody knows where the tiles were cut.
    """

    record: SlideRecord
    tiles: Sequence[bytes]
    darkness_T: NDArray[np.float64]
    places: Places | None = None


def of_tiles(slides: Sequence[tiles.SlideTiles]) -> list[SlideBag]:
    """Bags of tiles that are in memory; every tile is decoded once, to see how dark it is."""
    return [
        SlideBag(slide.record, slide.tiles, np.array([_darkness(tile) for tile in slide.tiles]))
        for slide in slides
    ]


def of_store(store: TileStore, records: Sequence[SlideRecord], spec: ModelSpec) -> list[SlideBag]:
    """Bags of the tiles that a client would send of every slide (`tiles.rows_of_slide`); no tile is read.

    Raises:
        DataError: naming every slide that has no tile in the store.
    """
    stored = tiles.of_store(store, records, spec)
    x_px, y_px, side_px, darkness = (
        store.index.column(name).to_numpy() for name in ("x_px", "y_px", "side_px", "darkness")
    )
    bags = []
    for slide in stored:
        rows = tiles.rows_of_slide(store, slide.record.image_id, spec)
        bags.append(
            SlideBag(slide.record, slide.tiles, darkness[rows], Places(x_px[rows], y_px[rows], side_px[rows]))
        )
    return bags


def of_slides(
    records: Sequence[SlideRecord], spec: ModelSpec, *, show_progress: bool = True
) -> list[SlideBag]:
    """Bags of tiles that are cut now and held in memory, in the order of `records`.

    Raises:
        DataError: naming every slide that has no usable tile, and why.
    """
    bags: list[SlideBag] = []
    problems: list[str] = []
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=usable_cores())
    try:
        futures = [pool.submit(_cut_slide, record, spec) for record in records]
        for record, future in tqdm(
            zip(records, futures, strict=True),
            total=len(records),
            desc="tiles",
            unit="slide",
            file=sys.stderr,
            disable=not show_progress,
        ):
            try:
                bags.append(future.result())
            except (SlidesError, OSError) as error:
                problems.append(f"{record.image_id}: {error}")
    finally:
        pool.shutdown(cancel_futures=True)
    if problems:
        raise DataError(f"{len(problems)} of {len(records)} slides cannot be used", problems)
    return bags


def _cut_slide(record: SlideRecord, spec: ModelSpec) -> SlideBag:
    from slides.reader import open_slide  # openslide is not needed where tiles come from a store
    from slides.tissue import iter_tiles

    with open_slide(record.path) as slide:
        refs, encoded = zip(*iter_tiles(slide, spec), strict=True)
    places = Places(
        *(np.array([getattr(ref, name) for ref in refs], np.int64) for name in ("x_px", "y_px", "side_px"))
    )
    return SlideBag(record, encoded, np.array([ref.darkness for ref in refs]), places)


def _darkness(tile: bytes) -> float:
    """Mean optical density (base 10, relative to white) of an encoded tile."""
    small_HWC = cv2.resize(
        decode_tile(tile, _DARKNESS_SIDE_PX), (_DARKNESS_SIDE_PX, _DARKNESS_SIDE_PX)
    ).astype(np.float64)
    return float(-np.log10(np.maximum(small_HWC, 1) / 255).mean())


def training_rows(bag: SlideBag, options: BagOptions, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Rows of the bag to learn from in an epoch: int64 [min(k, T)], a function of the arguments and the slide's name."""
    if options.choice == "darkest":
        return _darkest(bag, options.tiles)
    count = len(bag.tiles)
    generator = np.random.default_rng((seed, epoch, name_number(bag.record.image_id)))
    return np.sort(generator.permutation(count)[: min(options.tiles, count)])


def evaluation_rows(bag: SlideBag, options: BagOptions) -> NDArray[np.int64]:
    """Rows of the one bag by which a slide is judged, int64; the same whoever asks, and however often."""
    wanted = options.evaluation_tiles or options.tiles
    if options.choice == "darkest":
        return _darkest(bag, wanted)
    count = len(bag.tiles)
    if count <= wanted:
        return np.arange(count)
    return (2 * np.arange(wanted) + 1) * count // (2 * wanted)


def _darkest(bag: SlideBag, count: int) -> NDArray[np.int64]:
    return np.argsort(-bag.darkness_T, kind="stable")[:count].astype(np.int64)


def name_number(name: str) -> int:
    """A name as a number for a generator's seed: whatever order slides are in, each keeps its own."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How tiles are changed while learning: see `training.recipe.Recipe`."""

    colour_jitter: float
    stain_augmentation: float = 0.0

    def __call__(self, tile_HWC: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
        """uint8 [S, S, 3]: turned or mirrored, and recoloured; `generator` decides everything."""
        if self.stain_augmentation:
            tile_HWC = stains.augment(tile_HWC, self.stain_augmentation, generator)
        return tiles.augment(tile_HWC, self.colour_jitter, generator)


class BagItems(Dataset[tuple[torch.Tensor, int, int]]):
    """What datasets of bags share: an item is (values of the bag's tiles [T, ...], class of the slide, its index).

    Attributes:
        labels: class of each slide.
        slide_of_item: image_id of each slide.
    """

    def __init__(
        self, bags: Sequence[SlideBag], spec: ModelSpec, options: BagOptions, *, learns: bool, seed: int
    ) -> None:
        self.bags = bags
        self.spec = spec
        self.options = options
        self.learns = learns
        self.seed = seed
        self.epoch = 0
        self.labels = [spec.class_names.index(bag.record.label) for bag in bags]
        self.slide_of_item = [bag.record.image_id for bag in bags]

    def set_epoch(self, epoch: int) -> None:
        """Decides, with seed and slide, which tiles are in the bag and how they are changed from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.bags)

    def rows(self, index: int) -> NDArray[np.int64]:
        """Which of the slide's tiles are in the bag, int64 [T]."""
        if not self.learns:
            return evaluation_rows(self.bags[index], self.options)
        return training_rows(self.bags[index], self.options, seed=self.seed, epoch=self.epoch)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        return self._values(index, self.rows(index)), self.labels[index], index

    def _values(self, index: int, rows_T: NDArray[np.int64]) -> torch.Tensor:
        raise NotImplementedError

    def _generator(self, index: int) -> np.random.Generator:
        """Another one than `training_rows` draws from."""
        return np.random.default_rng(
            (self.seed, self.epoch, name_number(self.bags[index].record.image_id), 1)
        )

    @staticmethod
    def collate(
        items: Sequence[tuple[torch.Tensor, int, int]],
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor]:
        """A batch: ((values [B, T, ...] filled up with 0, mask bool [B, T]), labels int64 [B], indices int64 [B])."""
        longest = max(len(values) for values, _, _ in items)
        first = items[0][0]
        values_BT = first.new_zeros(len(items), longest, *first.shape[1:])
        mask_BT = torch.zeros(len(items), longest, dtype=torch.bool)
        for row, (values, _, _) in enumerate(items):
            values_BT[row, : len(values)] = values
            mask_BT[row, : len(values)] = True
        labels_B = torch.tensor([label for _, label, _ in items])
        return (values_BT, mask_BT), labels_B, torch.tensor([index for _, _, index in items])


class TileBags(BagItems):
    """Bags of decoded tiles, uint8 [T, S, S, 3]; changed by `augmentation` where there is one."""

    def __init__(
        self,
        bags: Sequence[SlideBag],
        spec: ModelSpec,
        options: BagOptions,
        *,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(bags, spec, options, learns=augmentation is not None, seed=seed)
        self.augmentation = augmentation

    def _values(self, index: int, rows_T: NDArray[np.int64]) -> torch.Tensor:
        generator = self._generator(index)
        decoded = []
        for row in rows_T:
            tile_HWC = decode_tile(self.bags[index].tiles[int(row)], self.spec.input_size_px)
            decoded.append(self.augmentation(tile_HWC, generator) if self.augmentation else tile_HWC)
        return torch.from_numpy(np.stack(decoded))


class EmbeddedBags(BagItems):
    """Bags of embeddings, FP32 [T, D]. While learning, each tile shows one of its views, another one each epoch.

    Args:
        embeddings: of each slide FP32 [1 + V, T, D], view 0 the plain one.
    """

    def __init__(
        self,
        bags: Sequence[SlideBag],
        embeddings: Sequence[NDArray[np.float32]],
        spec: ModelSpec,
        options: BagOptions,
        *,
        learns: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(bags, spec, options, learns=learns, seed=seed)
        self.embeddings = embeddings

    def _values(self, index: int, rows_T: NDArray[np.int64]) -> torch.Tensor:
        views_VTD = self.embeddings[index]
        view_T = np.zeros(len(rows_T), dtype=np.int64)
        if self.learns:
            view_T = self._generator(index).integers(len(views_VTD), size=len(rows_T))
        return torch.from_numpy(np.ascontiguousarray(views_VTD[view_T, rows_T]))
