"""Reading a tile store: the index as a table, tiles as bytes from memory-mapped files."""

from __future__ import annotations

import bisect
import itertools
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from slides import tissue
from slides.labels import SlideRecord
from slides.spec import ModelSpec
from training.errors import StoreError
from training.store import slide_file
from training.store.index import FORMAT, INDEX_NAME, META_KEY, VERSION
from training.store.spec import ALL_TILES, StoreSpec


class TileStore:
    """A finished tile store. It may be pickled (only its path travels) and read from several threads and processes.

    Attributes:
        path: the store's folder.
        spec_of_cut: how its tiles were cut.
        class_names: the labels it was made for.
        slides: usable slides, each with one tile or more, in the order of train.csv.
        failed: (image_id, reason) of slides without tiles.
        index: one row a tile, those of a slide together, richest in tissue first. Columns: image_id, patient_id,
            center_id, label; x_px, y_px, side_px (level 0), level, um_per_px, tissue_share, darkness, sharpness,
            stain_normalised.
        fingerprint: SHA-256 over names, patients, labels and the bytes of every tile.
        summary: all that the index says of itself (JSON types); "slides" has a line a slide with its file, size,
            resolution and measures.
    """

    def __init__(self, path: Path, index: pa.Table, summary: dict[str, Any]) -> None:
        """Use `TileStore.open`."""
        self.path = path
        self.index = index
        self.summary = summary
        self.spec_of_cut = StoreSpec.from_dict(summary["spec"], str(path))
        self.class_names: tuple[str, ...] = tuple(summary["class_names"])
        self.fingerprint: str = summary["fingerprint"]
        folder = Path(summary["data"]) / "train"
        self.slides: tuple[SlideRecord, ...] = tuple(
            SlideRecord(
                slide["image_id"],
                slide["center_id"],
                slide["patient_id"],
                slide["image_num"],
                slide["label"],
                folder / slide["source"],
            )
            for slide in summary["slides"]
        )
        self.failed: tuple[tuple[str, str], ...] = tuple(
            (slide["image_id"], slide["reason"]) for slide in summary["failed"]
        )
        ends = list(itertools.accumulate(slide["tiles"] for slide in summary["slides"]))
        self._starts = [0, *ends[:-1]]
        self._rows_of = {
            record.image_id: range(start, end)
            for record, start, end in zip(self.slides, self._starts, ends, strict=True)
        }
        self._chunks: dict[int, list[pa.BinaryArray]] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str) -> TileStore:
        """Open a store.

        Raises:
            StoreError: it is missing, not finished, of another version, or files of it are missing or cut short.
        """
        path = Path(path)
        index_path = path / INDEX_NAME
        if not index_path.is_file():
            there = (
                "its tiling was not finished; run the same command again" if path.is_dir() else "is missing"
            )
            raise StoreError(str(path), [f"{there} (`python -m training tile --data DIR --out {path}`)"])
        try:
            index = pq.read_table(index_path)
            summary = json.loads((index.schema.metadata or {}).get(META_KEY, b"{}"))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise StoreError(
                str(path), [f"{INDEX_NAME} is damaged: {error}; run the tiling again"]
            ) from error
        if not isinstance(summary, dict) or (summary.get("format"), summary.get("version")) != (
            FORMAT,
            VERSION,
        ):
            raise StoreError(
                str(path),
                [f"{INDEX_NAME} is not of a tile store of version {VERSION}; tile anew with --overwrite"],
            )
        problems = []
        for slide in summary["slides"]:
            file = slide_file.tiles_path(path, slide["image_id"])
            size_bytes = file.stat().st_size if file.is_file() else 0
            if size_bytes != slide["bytes"]:
                problems.append(
                    f"slides/{file.name} has {size_bytes} bytes, not {slide['bytes']}; delete it and tile again"
                )
        if problems:
            raise StoreError(str(path), problems)
        return cls(path, index.replace_schema_metadata(None), summary)

    def __len__(self) -> int:
        return int(self.summary["tiles"])

    def __repr__(self) -> str:
        return f"TileStore({str(self.path)!r}, slides={len(self.slides)}, tiles={len(self)})"

    def __getstate__(self) -> dict[str, str]:
        return {"path": str(self.path), "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, str]) -> None:
        opened = TileStore.open(state["path"])
        if opened.fingerprint != state["fingerprint"]:
            raise StoreError(state["path"], ["was cut anew while it was in use; start again"])
        self.__dict__.update(opened.__dict__)

    def rows_of(self, image_id: str) -> range:
        """Rows of a slide's tiles in the index, richest in tissue first; KeyError where the store lacks the slide."""
        return self._rows_of[image_id]

    def tile(self, row: int) -> bytes:
        """The encoded tile (JPEG 4:4:4) of a row of the index.

        Raises:
            IndexError: there is no such row.
            StoreError: the slide's file is damaged.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a store with {len(self)} tiles")
        number = bisect.bisect_right(self._starts, row) - 1
        chunks = self._chunks.get(number) or self._map(number)
        batch, place = divmod(row - self._starts[number], slide_file.BATCH_TILES)
        return bytes(chunks[batch][place].as_buffer())

    def richest(self, image_id: str, count: int, min_tissue_share: float = 0.0) -> list[int]:
        """Rows of the tiles that a client would send with these values of `tiles_per_slide` and `min_tissue_share`."""
        return self._choose(image_id, count, min_tissue_share, tissue.richest)

    def darkest(self, image_id: str, count: int, min_tissue_share: float = 0.0) -> list[int]:
        """Rows of the `count` darkest tiles, darkest first (`slides.tissue.darkest`)."""
        return self._choose(image_id, count, min_tissue_share, tissue.darkest)

    def check_fits(self, spec: ModelSpec) -> None:
        """Refuse a model whose tiles are not those of this store.

        Raises:
            StoreError: naming every difference in size, resolution, quality, least tissue, number and class names.
        """
        own = self.spec_of_cut
        problems = [
            f"{name} is {getattr(own, name)!r} in the store, {getattr(spec, name)!r} in the model's specification"
            for name in ("tile_size_px", "um_per_px", "jpeg_quality")
            if getattr(own, name) != getattr(spec, name)
        ]
        if spec.min_tissue_share < own.min_tissue_share:
            problems.append(
                f"min_tissue_share is {own.min_tissue_share} in the store, so tiles down to {spec.min_tissue_share} are missing"
            )
        if spec.tiles_per_slide > own.tiles_per_slide and own.tiles_per_slide < ALL_TILES:
            problems.append(
                f"tiles_per_slide is {own.tiles_per_slide} in the store, {spec.tiles_per_slide} are wanted"
            )
        unknown = sorted({record.label for record in self.slides} - set(spec.class_names))
        if unknown:
            problems.append(f"labels {', '.join(unknown)} are none of {', '.join(spec.class_names)}")
        if problems:
            raise StoreError(str(self.path), problems)

    def _choose(self, image_id: str, count: int, min_tissue_share: float, choose: Any) -> list[int]:
        rows = self._rows_of[image_id]
        part = self.index.slice(rows.start, len(rows))
        names = ("x_px", "y_px", "side_px", "tissue_share", "darkness")
        columns = [part.column(name).to_pylist() for name in names]
        refs = [tissue.TileRef(*values) for values in zip(*columns, strict=True)]
        row_of = dict(zip(refs, rows, strict=True))
        rich_enough = [ref for ref in refs if ref.tissue_share >= min_tissue_share]
        return [row_of[ref] for ref in choose(rich_enough, count)]

    def _map(self, number: int) -> Sequence[pa.BinaryArray]:
        path = slide_file.tiles_path(self.path, self.slides[number].image_id)
        try:
            column = slide_file.read_tiles(path).column("tile")
            column.validate(full=True)  # offsets that point elsewhere would be read without a word
        except (OSError, pa.ArrowException) as error:
            raise StoreError(str(self.path), [f"slides/{path.name} is damaged: {error}"]) from error
        expected = self.summary["slides"][number]["tiles"]
        full = slide_file.BATCH_TILES
        if len(column) != expected or any(len(chunk) != full for chunk in column.chunks[:-1]):
            raise StoreError(
                str(self.path), [f"slides/{path.name} is damaged: it has {len(column)} tiles, not {expected}"]
            )
        with self._lock:
            self._chunks[number] = column.chunks
        return column.chunks
