"""Embeddings of a frozen encoder: each tile is encoded once, and the answers are kept in files.

A file holds one slide. Its name is made of everything that its content depends on: the encoder's weights and layers, the
input size, the bytes of the tiles, the views. So a changed tile, recipe or network finds no file, an interrupted run goes
on where it stopped, and folds, seeds and head settings share what is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import accelerate
import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from slides.decode import decode_tile
from slides.errors import SlidesError
from slides.spec import ModelSpec
from training.errors import DataError, TrainingError
from training.mil.bags import Augmentation, SlideBag, name_number
from training.mil.network import embed
from training.mil.options import BagOptions

_VERSION = 1
_DECODED_AT_A_TIME = 64


def cache_folder() -> Path:
    """$CLOTLINE_CACHE, or clotline in the user's cache folder ($XDG_CACHE_HOME or ~/.cache); it may be deleted at any time."""
    own = os.environ.get("CLOTLINE_CACHE")
    if own:
        return Path(own) / "embeddings"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clotline" / "embeddings"


def encoder_fingerprint(encoder: nn.Module, spec: ModelSpec, options: BagOptions) -> str:
    """SHA-256 (hex) of what decides a tile's plain embedding beside the tile: weights, layers, input size."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    digest.update(
        json.dumps([_VERSION, spec.input_size_px, options.encoder_layer, options.tile_pooling]).encode()
    )
    return digest.hexdigest()


def embeddings_of(
    bags: Sequence[SlideBag],
    encoder: nn.Module,
    spec: ModelSpec,
    options: BagOptions,
    augmentation: Augmentation,
    *,
    seed: int,
    folder: Path | None = None,
    show_progress: bool = True,
) -> list[NDArray[np.float32]]:
    """Embeddings of every tile, FP32 [1 + views, T, D] a slide, memory-mapped; view 0 is the plain one.

    Every process of a launch calls it with the same arguments and does its share.

    Args:
        encoder: in evaluation mode, on the CPU; it goes to this process's device for the time being.
        augmentation: makes the views.
        folder: of the files; None = `cache_folder()`.

    Raises:
        DataError: naming every slide whose tiles cannot be read.
        OSError: the folder cannot be written.
    """
    state = accelerate.PartialState()
    about = [
        options.views,
        *([augmentation.colour_jitter, augmentation.stain_augmentation, seed] if options.views else []),
    ]
    key = hashlib.sha256(f"{encoder_fingerprint(encoder, spec, options)}{about}".encode()).hexdigest()[:32]
    own_folder = (cache_folder() if folder is None else folder) / key
    own_folder.mkdir(parents=True, exist_ok=True)
    device = state.device if torch.accelerator.is_available() else torch.device("cpu")
    encoder.to(device)
    names: dict[int, str] = {}
    problems: list[str] = []
    share = range(state.process_index, len(bags), state.num_processes)
    for index in tqdm(
        share,
        desc="embeddings",
        unit="slide",
        file=sys.stderr,
        disable=not (show_progress and state.is_main_process),
    ):
        bag = bags[index]
        try:
            path = own_folder / f"{_content(bag)}.npy"
            if _read(path, 1 + options.views, len(bag.tiles)) is None:
                _write(path, _embedded(bag, encoder, spec, options, augmentation, seed, device))
            names[index] = path.name
        except (SlidesError, TrainingError, OSError) as error:
            problems.append(f"{bag.record.image_id}: {error}")
    encoder.to("cpu")
    if state.num_processes > 1:  # also the barrier: nobody reads before everybody has written
        told = gather_object([(names, problems)])
        names = {index: name for own, _ in told for index, name in own.items()}
        problems = [problem for _, own in told for problem in own]
    if problems:
        raise DataError(f"{len(problems)} of {len(bags)} slides cannot be embedded", sorted(problems))
    return [np.load(own_folder / names[index], mmap_mode="r") for index in range(len(bags))]


def _content(bag: SlideBag) -> str:
    """SHA-256 of the slide's name (views depend on it) and the bytes of its tiles."""
    digest = hashlib.sha256(bag.record.image_id.encode())
    for tile in bag.tiles:
        digest.update(hashlib.sha256(tile).digest())
    return digest.hexdigest()[:32]


def _embedded(
    bag: SlideBag,
    encoder: nn.Module,
    spec: ModelSpec,
    options: BagOptions,
    augmentation: Augmentation,
    seed: int,
    device: torch.device,
) -> NDArray[np.float32]:
    views = []
    for view in range(1 + options.views):
        generator = np.random.default_rng((seed, view, name_number(bag.record.image_id)))
        embedded = []
        for start in range(0, len(bag.tiles), _DECODED_AT_A_TIME):
            tiles = [
                decode_tile(bag.tiles[row], spec.input_size_px)
                for row in range(start, min(start + _DECODED_AT_A_TIME, len(bag.tiles)))
            ]
            if view:
                tiles = [augmentation(tile_HWC, generator) for tile_HWC in tiles]
            embedded.append(embed(encoder, torch.from_numpy(np.stack(tiles)), device).numpy())
        views.append(np.concatenate(embedded))
    return np.stack(views)


def _read(path: Path, views: int, tiles: int) -> NDArray[np.float32] | None:
    """The file's array; None where there is none, or one that was cut short by a full disk or the like."""
    try:
        found: NDArray[np.float32] = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    good = found.ndim == 3 and found.shape[:2] == (views, tiles) and found.dtype == np.float32
    return found if good else None


def _write(path: Path, values_VTD: NDArray[np.float32]) -> None:
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with aside.open("wb") as stream:
            np.save(stream, values_VTD)
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
