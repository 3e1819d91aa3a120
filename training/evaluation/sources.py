"""Where the tiles of a slide come from: cut from the slide, a ready-cut file, or a tile store.

Each source gives the same tiles as training took: slides are cut by `slides.tissue`, as the client does it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from slides.decode import decode_tile
from slides.errors import SlidesError
from slides.labels import SlideRecord
from slides.spec import ModelSpec
from training.errors import EvaluationError, TrainingError
from training.processes import usable_cores
from training.tiles import rows_of_slide

if TYPE_CHECKING:
    from training.store.reader import TileStore


@dataclasses.dataclass(frozen=True)
class Places:
    """Where tiles lie on their slide, int64 [T] each, in pixels of level 0."""

    x_px: NDArray[np.int64]
    y_px: NDArray[np.int64]
    side_px: NDArray[np.int64]

    def __getitem__(self, rows_T: NDArray[np.integer]) -> Places:
        return Places(self.x_px[rows_T], self.y_px[rows_T], self.side_px[rows_T])


@dataclasses.dataclass(frozen=True)
class CutSlide:
    """A slide and its tiles, at least one.

    Attributes:
        tiles: encoded; those of a store are read when they are asked for.
        places: None where tiles came ready cut.
        darkness_T: FP64 [T], optical density, by which bags choose; None where tiles must be decoded to know it.
        um_per_px: of level 0; None where nobody knows.
    """

    record: SlideRecord
    tiles: Sequence[bytes]
    places: Places | None
    darkness_T: NDArray[np.float64] | None
    um_per_px: float | None

    def fingerprint(self) -> bytes:
        """SHA-256 over name, patient, label and the bytes of every tile."""
        record = self.record
        digest = hashlib.sha256("\0".join((record.image_id, record.patient_id, record.label)).encode())
        for tile in self.tiles:
            digest.update(hashlib.sha256(tile).digest())
        return digest.digest()


class Source(Protocol):
    """Something that slides are cut from; `cut` may be called by several threads."""

    @property
    def name(self) -> str:
        """Where tiles come from, for people."""
        ...

    @property
    def store(self) -> TileStore | None:
        """The tile store, if it is one."""
        ...

    def cut(self, record: SlideRecord, spec: ModelSpec) -> CutSlide:
        """The tiles that a model of `spec` is given of a slide.

        Raises:
            SlidesError, TrainingError, OSError: the slide gives no tile.
        """
        ...

    def tiles_again(self, slide: CutSlide, rows_T: Sequence[int], spec: ModelSpec) -> list[bytes]:
        """Some of the tiles of a slide that was cut before, `rows_T` being their places in its tiles; raises as `cut`."""
        ...


class SlideFiles:
    """train/<image_id>.tif: tissue is found and cut."""

    name = "slides"
    store = None

    def __init__(self, um_per_px: float | None = None) -> None:
        self._um_per_px = um_per_px

    def cut(self, record: SlideRecord, spec: ModelSpec) -> CutSlide:
        from slides.reader import open_slide  # openslide is not needed where tiles come ready cut
        from slides.tissue import iter_tiles

        with open_slide(record.path, um_per_px=self._um_per_px) as slide:
            refs, tiles = zip(*iter_tiles(slide, spec), strict=True)
            places = Places(
                *(np.array([getattr(ref, axis) for ref in refs]) for axis in ("x_px", "y_px", "side_px"))
            )
            darkness_T = np.array([ref.darkness for ref in refs])
            return CutSlide(record, tiles, places, darkness_T, slide.um_per_px)

    def tiles_again(self, slide: CutSlide, rows_T: Sequence[int], spec: ModelSpec) -> list[bytes]:
        from slides.reader import open_slide
        from slides.tissue import TileRef, iter_tiles

        if slide.places is None:
            return []
        places = slide.places[np.asarray(rows_T, dtype=np.int64)]
        refs = [
            TileRef(int(x_px), int(y_px), int(side_px), 1.0)
            for x_px, y_px, side_px in zip(places.x_px, places.y_px, places.side_px, strict=True)
        ]
        with open_slide(slide.record.path, um_per_px=self._um_per_px) as opened:
            return [tile for _, tile in iter_tiles(opened, spec, refs)]


class TileFiles:
    """train/<image_id>.jpg or .png: every file is the one tile of its slide."""

    name = "tiles"
    store = None

    def cut(self, record: SlideRecord, spec: ModelSpec) -> CutSlide:
        data = record.path.read_bytes()
        decode_tile(data, spec.input_size_px)  # a damaged file is that slide's fault, not its batch's
        return CutSlide(record, (data,), None, None, None)

    def tiles_again(self, slide: CutSlide, rows_T: Sequence[int], spec: ModelSpec) -> list[bytes]:
        return [slide.record.path.read_bytes()]


class StoredTiles:
    """A tile store that `python -m training tile` wrote."""

    name = "store"

    def __init__(self, store: TileStore) -> None:
        self.store: TileStore = store

    def cut(self, record: SlideRecord, spec: ModelSpec) -> CutSlide:
        store = self.store
        rows = rows_of_slide(store, record.image_id, spec)
        index = store.index.take(rows)
        if not rows:
            raise EvaluationError(
                record.image_id, [f"no tile of the store has {spec.min_tissue_share:.0%} of tissue"]
            )
        x_px, y_px, side_px, darkness_T = (
            index.column(name).to_numpy() for name in ("x_px", "y_px", "side_px", "darkness")
        )
        cut = store.spec_of_cut
        um_per_px = float(cut.tile_size_px * cut.um_per_px / side_px[0])
        places = Places(x_px, y_px, side_px)
        return CutSlide(record, _TilesOfStore(store, rows), places, darkness_T, um_per_px)

    def tiles_again(self, slide: CutSlide, rows_T: Sequence[int], spec: ModelSpec) -> list[bytes]:
        tiles = self.cut(slide.record, spec).tiles
        return [tiles[row] for row in rows_T]


class _TilesOfStore(Sequence[bytes]):
    def __init__(self, store: TileStore, rows: Sequence[int]) -> None:
        self._store, self._rows = store, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        if isinstance(index, slice):
            return _TilesOfStore(self._store, self._rows[index])
        return self._store.tile(self._rows[index])


def cut_ahead(
    source: Source, records: Sequence[SlideRecord], spec: ModelSpec
) -> Iterator[tuple[SlideRecord, CutSlide | str]]:
    """Slides in the order of `records`, a few cut ahead in threads; a slide without usable tiles gives its reason."""
    workers = min(2, usable_cores()) if source.name == "slides" else usable_cores()
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    pending: list[concurrent.futures.Future[CutSlide | str]] = []

    def cut(record: SlideRecord) -> CutSlide | str:
        try:
            return source.cut(record, spec)
        except (SlidesError, TrainingError, OSError) as error:
            return reason_of(error)

    try:
        for place, record in enumerate(records):
            while len(pending) <= workers and place + len(pending) < len(records):
                pending.append(pool.submit(cut, records[place + len(pending)]))
            yield record, pending.pop(0).result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def reason_of(error: Exception) -> str:
    """An error as one line for a table of bad slides."""
    return " ".join(str(error).split()) or type(error).__name__
