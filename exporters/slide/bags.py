"""Bags that slide models are compared on, and tiles that their encoders are calibrated with: never of the same patients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from exporters.comparison_tiles import calibration_tiles
from exporters.errors import GoldenTilesError
from exporters.golden import GOLDEN_NAME, golden_text
from exporters.slide.parity import Reference
from exporters.slide.source import Bag, SlideSource
from training.checkpoint import Checkpoint, GoldenTile, suffix_of
from training.errors import TrainingError

MOST_GOLDEN_BAGS = 8
MOST_BAGS = 64
MOST_TILES_A_BAG = 16
"""Of a tile store; golden bags are taken whole."""
_SCORES = ("entropy", "mutual_information", "std")


def comparison_bags(source: SlideSource, store: Path | None) -> tuple[Bag, ...]:
    """The golden bags of the members, or bags of the held-out patients of a tile store.

    Raises:
        GoldenTilesError: it is no tile store, or holds none of them.
    """
    return source.golden_bags[:MOST_GOLDEN_BAGS] if store is None else _of_store(source, store)


def calibration_of(source: SlideSource, tiles: Path) -> np.ndarray:
    """uint8 [M, S, S, 3] RGB of patients that all members were trained on; raises GoldenTilesError."""
    golden = tuple(
        GoldenTile(bag.image_id, bag.label or "", tile, ())
        for bag in source.golden_bags
        for tile in bag.tiles
    )
    every = [set(map(str, manifest["data"].get("train_patients", ()))) for manifest in source.manifests]
    data = {
        "train_patients": sorted(set.intersection(*every)),
        "held_out_patients": sorted(_held_out(source)),
    }
    # What the function needs of a tile checkpoint: its classes and size, patients, and golden tiles.
    stand_in = Checkpoint(cast(Any, None), source.spec, {"data": data}, golden)
    return calibration_tiles(stand_in, tiles)


def golden_files(source: SlideSource, expected: Reference) -> dict[str, bytes]:
    """The files of golden/: bags of encoded tiles, and what PyTorch answers to them."""
    files: dict[str, bytes] = {}
    items = []
    for number, (bag, answer) in enumerate(
        zip(expected.bags[:MOST_GOLDEN_BAGS], expected.answers, strict=False)
    ):
        paths = [f"{number:04d}/{place:04d}{suffix_of(tile)}" for place, tile in enumerate(bag.tiles)]
        files.update(zip(paths, bag.tiles, strict=True))
        items.append(
            {
                "paths": paths,
                "image_id": bag.image_id,
                "label": bag.label,
                "probabilities": answer["probabilities"].tolist(),
                "attention": answer["attention"].tolist(),
                "answered": bool(answer["answered"][0]),
                **{name: float(answer[name][0]) for name in _SCORES},
            }
        )
    return {**files, GOLDEN_NAME: golden_text(source.kind, source.spec.class_names, items)}


def _held_out(source: SlideSource) -> set[str]:
    """Patients that some member was not trained on."""
    return {
        str(patient)
        for manifest in source.manifests
        for patient in manifest["data"].get("held_out_patients", ())
    }


def _of_store(source: SlideSource, path: Path) -> tuple[Bag, ...]:
    from training.store.reader import TileStore

    held_out = _held_out(source)
    try:
        store = TileStore.open(path)
        records = [record for record in store.slides if not held_out or record.patient_id in held_out]
        bags = []
        for record in _spread(records, MOST_BAGS):
            rows = _spread(list(store.rows_of(record.image_id)), MOST_TILES_A_BAG)
            tiles = tuple(bytes(store.tile(int(row))) for row in rows)
            if tiles:
                bags.append(Bag(record.image_id, record.label, tiles))
    except (TrainingError, OSError) as error:
        raise GoldenTilesError(
            f"The tile store {path} cannot be read: {error}. Slide models are compared on bags of a tile store "
            "(`python -m training tile`); name one as --tiles."
        ) from error
    if not bags:
        raise GoldenTilesError(
            f"{path} holds no slide of the held-out patients. Name the store that the network was trained on as --tiles."
        )
    return tuple(bags)


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    if len(items) <= most:
        return list(items)
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, most)]
