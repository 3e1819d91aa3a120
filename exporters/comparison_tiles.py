"""Tiles that artefacts are compared on, and tiles that INT8 is calibrated with: never the same ones.

Both are read from any of three places:

- a directory of JPEG and PNG files: no labels, no patients;
- a data set of ready-cut tiles (`train.csv` and `train/<image_id>.jpg`);
- a tile store, as `python -m training tile` writes it.

From the last two, comparison takes the tiles of the checkpoint's held-out patients only, calibration those of its
training patients only.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporters.errors import GoldenTilesError
from slides.decode import decode_tile
from slides.errors import SlidesError, TileDecodeError
from slides.labels import SlideRecord, patient_of, read_labels
from slides.spec import ModelSpec
from training.checkpoint import Checkpoint
from training.errors import StoreError

MOST_COMPARISON_TILES = 1024
MOST_CALIBRATION_TILES = 128
LEAST_CALIBRATION_TILES = 16
_MOST_TILES_A_SLIDE = 16
_STORE_NAME = "store.json"
_TILE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class EncodedTile:
    """A tile as it travels, and what is known of it.

    Attributes:
        name: for errors.
        data: JPEG or PNG.
        label: its true class, None where unknown.
        image_id: the slide that it was cut from, None where unknown.
        patient_id: whose slide that is, None where unknown.
    """

    name: str
    data: bytes
    label: str | None = None
    image_id: str | None = None
    patient_id: str | None = None


@dataclass(frozen=True)
class Truth:
    """What is true of N tiles, in their order; None where a tile's label is unknown."""

    class_names: tuple[str, ...]
    labels_N: tuple[str | None, ...]
    images_N: tuple[str | None, ...]
    patients_N: tuple[str | None, ...]


@dataclass(frozen=True)
class ComparisonTiles:
    """N >= 1 tiles, three times in the same order.

    Attributes:
        tiles_NHWC: uint8 [N, S, S, 3] RGB, as the served network gets them.
        truth: what is true of them.
        encoded: JPEG or PNG, as clients send them.
    """

    tiles_NHWC: np.ndarray
    truth: Truth
    encoded: tuple[EncodedTile, ...]


@dataclass(frozen=True)
class _Wanted:
    only: set[str] | None
    never: frozenset[str]

    def __contains__(self, patient_id: object) -> bool:
        return patient_id not in self.never and (self.only is None or patient_id in self.only)


def comparison_tiles(checkpoint: Checkpoint, source: Path | None) -> ComparisonTiles:
    """Tiles for the parity gate: the checkpoint's golden tiles, or those of `source`.

    Raises:
        GoldenTilesError: there is none, or one of them is no tile.
    """
    held_out = _patients(checkpoint, "held_out_patients")
    if source is None:
        encoded = golden_tiles(checkpoint)
    else:
        found = _read(source, "--tiles", checkpoint.spec, _Wanted(held_out or None, frozenset()))
        encoded = _spread(found, MOST_COMPARISON_TILES)
    truth = Truth(
        checkpoint.spec.class_names,
        tuple(tile.label for tile in encoded),
        tuple(tile.image_id for tile in encoded),
        tuple(tile.patient_id for tile in encoded),
    )
    decoded_NHWC = decode_tiles(encoded, checkpoint.spec.input_size_px, option="--tiles")
    return ComparisonTiles(decoded_NHWC, truth, tuple(encoded))


def golden_tiles(checkpoint: Checkpoint) -> list[EncodedTile]:
    """The tiles that travel with the checkpoint."""
    return [
        EncodedTile(f"golden tile {number}", tile.data, tile.label, tile.image_id, patient_of(tile.image_id))
        for number, tile in enumerate(checkpoint.golden_tiles)
    ]


def calibration_tiles(checkpoint: Checkpoint, source: Path) -> np.ndarray:
    """Tiles to calibrate INT8 with: of training patients where patients are known, never a golden tile.

    Returns:
        uint8 [M, S, S, 3] RGB, 16 <= M <= 128, spread evenly over what `source` holds.

    Raises:
        GoldenTilesError: too few, no tile, or only tiles that were held out.
    """
    held_out = _patients(checkpoint, "held_out_patients")
    trained = _patients(checkpoint, "train_patients")
    wanted = _Wanted(trained or None, frozenset(held_out))
    found = _read(source, "--calibration-tiles", checkpoint.spec, wanted)
    golden = {_digest(tile.data) for tile in checkpoint.golden_tiles}
    usable = [tile for tile in found if _digest(tile.data) not in golden]
    if len(usable) < LEAST_CALIBRATION_TILES:
        left_out = f", {len(found) - len(usable)} of them held-out tiles" if len(usable) < len(found) else ""
        raise GoldenTilesError(
            f"{source} holds {len(found)} tiles of training patients{left_out}; calibration needs at least "
            f"{LEAST_CALIBRATION_TILES} that were trained on. Name another directory, data set or tile store as "
            "--calibration-tiles."
        )
    chosen = _spread(usable, MOST_CALIBRATION_TILES)
    return decode_tiles(chosen, checkpoint.spec.input_size_px, option="--calibration-tiles")


def decode_tiles(encoded: Sequence[EncodedTile], size_px: int, *, option: str = "--tiles") -> np.ndarray:
    """Decode tiles as the server does: uint8 [N, size_px, size_px, 3] RGB, N >= 1.

    Raises:
        GoldenTilesError: there is none, or one of them is no tile.
    """
    if not encoded:
        raise GoldenTilesError(
            "The checkpoint holds no golden tiles, and without real tiles nothing can be compared. "
            f"Give a directory of JPEG or PNG tiles with {option}."
        )
    decoded = []
    for tile in encoded:
        try:
            decoded.append(decode_tile(tile.data, size_px))
        except TileDecodeError as error:
            raise GoldenTilesError(
                f"{tile.name} is no tile: {error}. Remove it, or give others with {option}."
            ) from error
    return np.stack(decoded)


def _read(source: Path, option: str, spec: ModelSpec, wanted: _Wanted) -> list[EncodedTile]:
    """All tiles of a directory, data set or store, of the patients asked for where patients are known."""
    if (source / "train.csv").is_file() and (source / "train").is_dir():
        tiles = _of_data_set(source, option, spec.class_names, wanted)
    elif (source / _STORE_NAME).is_file():
        tiles = _of_store(source, option, spec, wanted)
    else:
        return read_tiles(source, option=option)
    if not tiles:
        raise GoldenTilesError(
            f"{source} holds no tile of the {'held-out' if option == '--tiles' else 'training'} patients of this "
            f"checkpoint. Name the data set that it was trained on as {option}, or a plain directory of tiles."
        )
    return tiles


def read_tiles(directory: Path, *, option: str = "--tiles") -> list[EncodedTile]:
    """The JPEG and PNG files of a directory, in the order of their names.

    Raises:
        GoldenTilesError: it is missing or unreadable, or holds no such file.
    """
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix.lower() in _TILE_SUFFIXES)
        tiles = [EncodedTile(str(path), path.read_bytes()) for path in paths]
    except OSError as error:
        raise GoldenTilesError(
            f"The directory of tiles {directory} cannot be read: {error.strerror}. "
            f"Name one with JPEG or PNG tiles as {option}."
        ) from error
    if not tiles:
        raise GoldenTilesError(
            f"{directory} holds no JPEG or PNG file. Name a directory with tiles as {option}."
        )
    return tiles


def _of_data_set(source: Path, option: str, class_names: Sequence[str], wanted: _Wanted) -> list[EncodedTile]:
    try:
        records = [r for r in read_labels(source, class_names=class_names) if r.patient_id in wanted]
        if records and not any(record.path.suffix.lower() in _TILE_SUFFIXES for record in records):
            raise GoldenTilesError(
                f"{source} holds whole slides. Cut them into a store (python -m training tile) and name that as {option}."
            )
        return [
            _known(f"{record.path}", record.path.read_bytes(), record)
            for record in records
            if record.path.suffix.lower() in _TILE_SUFFIXES
        ]
    except (SlidesError, OSError) as error:
        raise GoldenTilesError(
            f"The data set {source} cannot be read: {_in_one_line(error)}. Name another as {option}."
        ) from error


def _of_store(source: Path, option: str, spec: ModelSpec, wanted: _Wanted) -> list[EncodedTile]:
    """Of each slide up to 16 of the tiles that a client would send: tiles of one slide are alike."""
    from training.store.reader import TileStore

    try:
        store = TileStore.open(source)
        store.check_fits(
            dataclasses.replace(spec, tiles_per_slide=1, min_tissue_share=store.spec_of_cut.min_tissue_share)
        )
        tiles = []
        for record in store.slides:
            if record.patient_id in wanted:
                rows = store.richest(record.image_id, spec.tiles_per_slide, spec.min_tissue_share)
                for row in _spread(rows, _MOST_TILES_A_SLIDE):
                    tiles.append(_known(f"{source}, row {row}", store.tile(row), record))
        return tiles
    except (StoreError, OSError) as error:
        raise GoldenTilesError(
            f"The tile store {source} cannot be used: {_in_one_line(error)}. Name another as {option}."
        ) from error


def _in_one_line(error: Exception) -> str:
    return "; ".join(line.strip().removeprefix("- ") for line in str(error).splitlines())


def _known(name: str, data: bytes, record: SlideRecord) -> EncodedTile:
    return EncodedTile(name, data, record.label, record.image_id, record.patient_id)


def _patients(checkpoint: Checkpoint, key: str) -> set[str]:
    data: Mapping[str, Any] = checkpoint.manifest["data"]
    found = data.get(key)
    return {str(patient) for patient in found} if isinstance(found, list) else set()


def _spread(items: list[Any], most: int) -> list[Any]:
    if len(items) <= most:
        return items
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, most)]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
