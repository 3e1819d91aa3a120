"""golden/: tiles (or bags) that travel with a release, and what PyTorch answers to them.

    golden/golden.json   {"format": "clotline.golden", "version": 1, "kind", "class_names", "items": [...]}
    golden/0000.jpg      an item of kind "tile": "path", "image_id", "label", "probabilities"
    golden/0000/0000.jpg a tile of an item of the other kinds, which have "paths" in its place

Paths are relative to golden/.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters.comparison_tiles import EncodedTile, decode_tiles
from exporters.errors import ReleaseError
from exporters.parity import one_torch_thread
from training.checkpoint import Checkpoint, suffix_of
from training.network import ServedNetwork

FORMAT = "clotline.golden"
VERSION = 1
GOLDEN_NAME = "golden.json"
MOST_TILES = 32
_BATCH = 16


def golden_of_tiles(checkpoint: Checkpoint, others: Sequence[EncodedTile]) -> dict[str, bytes]:
    """The files of golden/ of a tile checkpoint: its golden tiles, or up to 32 of `others` where it has none."""
    tiles = [
        EncodedTile(f"golden tile {number}", tile.data, tile.label, tile.image_id)
        for number, tile in enumerate(checkpoint.golden_tiles)
    ]
    if not tiles:
        places = np.linspace(0, len(others) - 1, min(MOST_TILES, len(others)))
        tiles = [others[round(place)] for place in places]
    probabilities_NK = _probabilities(checkpoint, decode_tiles(tiles, checkpoint.spec.input_size_px))
    files, items = {}, []
    for number, (tile, probabilities_K) in enumerate(zip(tiles, probabilities_NK, strict=True)):
        path = f"{number:04d}{suffix_of(tile.data)}"
        files[path] = tile.data
        items.append(
            {
                "path": path,
                "image_id": tile.image_id,
                "label": tile.label,
                "probabilities": [float(value) for value in probabilities_K],
            }
        )
    return {**files, GOLDEN_NAME: golden_text("tile", checkpoint.spec.class_names, items)}


def golden_text(kind: str, class_names: Sequence[str], items: Sequence[Mapping[str, Any]]) -> bytes:
    """The content of golden.json."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "class_names": list(class_names),
        "items": list(items),
    }
    return (
        json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    ).encode()


def read_golden(directory: Path) -> dict[str, Any]:
    """golden.json of a release's golden/, checked for format and version; raises ReleaseError."""
    path = directory / GOLDEN_NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReleaseError(f"{path} cannot be read as JSON: {error}. Export again.") from error
    if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (
        FORMAT,
        VERSION,
    ):
        raise ReleaseError(f"{path} is not golden tiles of version {VERSION}. Export again.")
    return document


def _probabilities(checkpoint: Checkpoint, tiles_NHWC: np.ndarray) -> np.ndarray:
    served = ServedNetwork(checkpoint.model).eval()
    with one_torch_thread(), torch.inference_mode():
        parts = [served(tiles)[0] for tiles in torch.from_numpy(tiles_NHWC).split(_BATCH)]
    answered: np.ndarray = torch.cat(parts).numpy()
    return answered
