"""Is what Triton serves what PyTorch computes? Every held-out tile, once through each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.slide_client import SlideClient
from slides.decode import decode_tile
from slides.labels import SlideRecord
from slides.reader import open_slide
from slides.spec import ModelSpec
from slides.tissue import iter_tiles

MAX_ABS_DIFF = 1e-4
TORCH_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Parity:
    """Served probabilities against PyTorch's, over all held-out tiles.

    Attributes:
        model: name on the server.
        url: server and protocol that were used.
        tiles: how many tiles were compared.
        max_abs_diff: largest |p_served - p_torch| of any tile and class.
        label_mismatches: tiles whose served label is not PyTorch's.
    """

    model: str
    url: str
    tiles: int
    max_abs_diff: float
    label_mismatches: int

    @property
    def holds(self) -> bool:
        return self.tiles > 0 and self.max_abs_diff <= MAX_ABS_DIFF and self.label_mismatches == 0


def held_out_tiles(records: Sequence[SlideRecord], spec: ModelSpec, source: str) -> dict[str, list[bytes]]:
    """Encoded tiles of each image, cut as the client cuts them.

    Args:
        source: "slides", or "tiles" where each image is one tile itself.
    """
    if source == "tiles":
        return {record.image_id: [record.path.read_bytes()] for record in records}
    tiles = {}
    for record in records:
        with open_slide(record.path) as slide:
            tiles[record.image_id] = [data for _, data in iter_tiles(slide, spec)]
    return tiles


def torch_probabilities(checkpoint: Path, tiles: Sequence[bytes]) -> NDArray[np.float32]:
    """float32 [N, K] of a checkpoint's network on encoded tiles, on the CPU."""
    import torch

    from training.checkpoint import load

    loaded = load(checkpoint, device="cpu")
    model = loaded.model.eval()
    rows = []
    with torch.inference_mode():
        for start in range(0, len(tiles), TORCH_BATCH):
            batch_NHWC = np.stack(
                [decode_tile(data, loaded.spec.input_size_px) for data in tiles[start : start + TORCH_BATCH]]
            )
            rows.append(torch.softmax(model(torch.from_numpy(batch_NHWC)).float(), dim=1).numpy())
    return np.concatenate(rows)


def served_parity(url: str, model: str, tiles: Sequence[bytes], torch_NK: NDArray[np.float32]) -> Parity:
    """Ask the server for every tile and compare; raises clients.errors.ClientError if it does not answer."""
    with SlideClient(url, model=model) as client:
        answers = client.classify(tiles)
    difference_NK = np.abs(answers.probabilities_NK.astype(np.float64) - torch_NK)
    mismatches = int((answers.label_index_N != torch_NK.argmax(axis=1)).sum())
    return Parity(model, url, len(tiles), float(difference_NK.max(initial=0.0)), mismatches)


def image_differences(
    served: Mapping[str, Mapping[str, float]],
    tiles: Mapping[str, Sequence[Any]],
    torch_NK: NDArray[np.float32],
) -> float:
    """Largest |p| difference of any image and class between what the client answered and the mean of
    PyTorch's tiles.

    Args:
        served: image_id -> class name -> probability, classes in the model's order.
        tiles: image_id -> its tiles, in the order of the rows of `torch_NK`.
    """
    largest, row = 0.0, 0
    for image_id, of_image in tiles.items():
        mean_K = torch_NK[row : row + len(of_image)].astype(np.float64).mean(axis=0)
        row += len(of_image)
        largest = max(largest, float(np.abs(np.array([*served[image_id].values()]) - mean_K).max()))
    return largest
