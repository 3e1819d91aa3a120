"""The slides that an evaluation is about: labels, files, and where their tiles come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from slides.labels import SlideRecord, read_labels
from slides.spec import ModelSpec
from training.errors import EvaluationError
from training.evaluation.sources import SlideFiles, Source, StoredTiles, TileFiles

TILE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclasses.dataclass(frozen=True)
class Data:
    """What can be evaluated.

    Attributes:
        records: every labelled slide, in the order of the labels; a file may be missing.
        bad: image_id -> reason, slides that are known to give no tile.
        source: where tiles come from.
    """

    records: tuple[SlideRecord, ...]
    bad: dict[str, str]
    source: Source


def open_data(
    data_dir: Path | None, store_path: Path | None, specs: Sequence[ModelSpec], um_per_px: float | None = None
) -> Data:
    """Labels from DIR/train.csv or from a store, tiles from the store if there is one.

    Args:
        specs: what the models expect, at least one; their classes are the same.
        um_per_px: resolution of level 0 of slides that do not state one.

    Raises:
        EvaluationError: neither is given, or classes differ.
        LabelsError: as `read_labels`.
        StoreError: the store cannot be read, or was cut otherwise than a model wants it.
    """
    if store_path is None and data_dir is None:
        raise EvaluationError("evaluation", ["--data DIR, --store STORE or both are needed"])
    class_names = specs[0].class_names
    labelled: tuple[SlideRecord, ...] = ()
    if data_dir is not None:  # a missing file is that slide's reason later, not the end of all
        labelled = tuple(read_labels(data_dir, class_names=class_names, allow_missing=True))
    if store_path is None:
        suffixes = {record.path.suffix.lower() for record in labelled if record.path.exists()}
        tiles_only = bool(suffixes) and suffixes <= set(TILE_SUFFIXES)
        source: Source = TileFiles() if tiles_only else SlideFiles(um_per_px)
        return Data(labelled, {}, source)
    from training.store.reader import TileStore

    store = TileStore.open(store_path)
    for spec in specs:
        store.check_fits(spec)
    unknown = sorted({record.label for record in store.slides} - set(class_names))
    if unknown:
        raise EvaluationError(
            str(store_path), [f"label {name!r} is none of {', '.join(class_names)}" for name in unknown]
        )
    failed = dict(store.failed)
    if data_dir is None:
        return Data(tuple(store.slides), failed, StoredTiles(store))
    held = {record.image_id for record in store.slides}
    bad = {
        record.image_id: failed.get(record.image_id, f"not in the tile store {store_path}")
        for record in labelled
        if record.image_id not in held
    }
    return Data(labelled, bad, StoredTiles(store))
