"""Tile and slide checkpoints behind one call: cut slides in, one answer a slide out, in bounded memory."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import nn

from slides.aggregate import mean_probabilities
from slides.decode import decode_tile
from slides.errors import SlidesError
from slides.spec import ModelSpec
from training import checkpoint
from training.errors import TrainingError
from training.evaluation.candidates import Candidate
from training.evaluation.sources import CutSlide, reason_of
from training.mil import bags
from training.mil import checkpoint as slide_checkpoint
from training.processes import usable_cores
from training.tiles import SlideTiles

MEMORY_SHARE = 0.25
"""Of the memory that is free, how much a batch's activations may take."""
LARGEST_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a checkpoint says of a slide.

    Attributes:
        probabilities_K: float64 [K] of the slide.
        rows_T: int [T], the tiles that the answer is made of, as places in `CutSlide.tiles`.
        tile_probabilities_TK: float32 [T, K], of a tile checkpoint.
        attention_T: float32 [T], sum 1, of a slide checkpoint.
    """

    probabilities_K: NDArray[np.float64]
    rows_T: NDArray[np.int64]
    tile_probabilities_TK: NDArray[np.float32] | None = None
    attention_T: NDArray[np.float32] | None = None


class Network(Protocol):
    """A loaded checkpoint.

    Attributes:
        batch_tiles: tiles that are computed at once.
    """

    batch_tiles: int

    def answers(self, slides: Sequence[CutSlide]) -> Iterator[Answer | str]:
        """One for each slide, in order; a string is the reason why there is none."""
        ...


def load(candidate: Candidate, device: torch.device, batch_tiles: int | None) -> Network:
    """Load a candidate's weights.

    Args:
        batch_tiles: None takes as many as fit into MEMORY_SHARE of the free memory.

    Raises:
        CheckpointError: as `training.checkpoint.load`.
    """
    return (TileAnswers if candidate.kind == "tile" else SlideAnswers)(candidate.path, device, batch_tiles)


class TileAnswers:
    """A tile checkpoint: a slide's answer is the mean over its tiles."""

    def __init__(self, path: Path, device: torch.device, batch_tiles: int | None) -> None:
        loaded = checkpoint.load(path, device)
        self._model, self._spec, self._device = loaded.model, loaded.spec, device
        self.batch_tiles = batch_tiles or fitting_batch(self._model, self._spec, device)

    def answers(self, slides: Sequence[CutSlide]) -> Iterator[Answer | str]:
        places = [(number, row) for number, slide in enumerate(slides) for row in range(len(slide.tiles))]
        of_slide: list[list[NDArray[np.float32]]] = [[] for _ in slides]
        reasons: dict[int, str] = {}
        with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
            start = 0
            while start < len(places):
                part = places[start : start + self.batch_tiles]  # a GPU may make it smaller on the way
                start += len(part)
                decoded = pool.map(lambda place: self._decoded(slides[place[0]], place[1]), part)
                tiles, owners = [], []
                for (number, row), tile_HWC in zip(part, decoded, strict=True):
                    if isinstance(tile_HWC, str):
                        reasons.setdefault(number, f"tile {row}: {tile_HWC}")
                    else:
                        tiles.append(tile_HWC)
                        owners.append(number)
                if tiles:
                    for number, values_K in zip(owners, self._probabilities(np.stack(tiles)), strict=True):
                        of_slide[number].append(values_K)
        for number, values in enumerate(of_slide):
            if number in reasons:
                yield reasons[number]
                continue
            values_TK = np.stack(values)
            if not np.isfinite(values_TK).all():
                yield "the network answers values that are not finite"
                continue
            yield Answer(
                mean_probabilities(values_TK), np.arange(len(values_TK)), tile_probabilities_TK=values_TK
            )

    def _decoded(self, slide: CutSlide, row: int) -> NDArray[np.uint8] | str:
        try:
            return decode_tile(slide.tiles[row], self._spec.input_size_px)
        except (SlidesError, TrainingError, OSError) as error:
            return reason_of(error)

    def _probabilities(self, tiles_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """FP32 [N, K]; a batch that a GPU has no memory for is halved, and later ones stay that small."""
        try:
            with torch.inference_mode():
                logits_NK = self._model(torch.from_numpy(tiles_NHWC).to(self._device))
                return torch.softmax(logits_NK.float(), dim=1).cpu().numpy()
        except torch.cuda.OutOfMemoryError:
            if len(tiles_NHWC) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(tiles_NHWC) // 2
        self.batch_tiles = max(1, half)
        return np.concatenate(
            [self._probabilities(tiles_NHWC[:half]), self._probabilities(tiles_NHWC[half:])]
        )


class SlideAnswers:
    """A slide checkpoint: the head weighs the bag that it was trained to look at."""

    def __init__(self, path: Path, device: torch.device, batch_tiles: int | None) -> None:
        self._loaded = slide_checkpoint.load(path, device)
        self.batch_tiles = batch_tiles or 64  # slides that are gathered before they are answered one by one

    def answers(self, slides: Sequence[CutSlide]) -> Iterator[Answer | str]:
        for slide in slides:
            try:
                rows_T = bags.evaluation_rows(_bag(slide), self._loaded.bags)
                told = self._loaded.answer([slide.tiles[row] for row in rows_T.tolist()])
            except (SlidesError, TrainingError, OSError) as error:
                yield reason_of(error)
                continue
            if not np.isfinite(told.probabilities_K).all():
                yield "the network answers values that are not finite"
                continue
            yield Answer(told.probabilities_K.astype(np.float64), rows_T, attention_T=told.attention_T)


def _bag(slide: CutSlide) -> bags.SlideBag:
    if slide.darkness_T is None:
        return bags.of_tiles([SlideTiles(slide.record, tuple(slide.tiles))])[0]
    return bags.SlideBag(slide.record, slide.tiles, slide.darkness_T)


def fitting_batch(model: nn.Module, spec: ModelSpec, device: torch.device) -> int:
    """How many tiles fit into MEMORY_SHARE of the free memory, 1..LARGEST_BATCH.

    Counts the outputs of all layers for one tile, as if none were freed before the last: more than is really needed.
    """
    bytes_a_tile = spec.input_size_px**2 * 3

    def count(_: nn.Module, __: object, output: object) -> None:
        nonlocal bytes_a_tile
        if isinstance(output, torch.Tensor):
            bytes_a_tile += output.numel() * output.element_size()

    layers = [module for module in model.modules() if not any(True for _ in module.children())]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.inference_mode():
            model(torch.zeros(1, spec.input_size_px, spec.input_size_px, 3, dtype=torch.uint8, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return int(max(1, min(LARGEST_BATCH, MEMORY_SHARE * free_bytes(device) // bytes_a_tile)))


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device; of a CPU, within the limit of its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        folder = "/sys/fs/cgroup" if limit == "memory.max" else "/sys/fs/cgroup/memory"
        try:
            with open(os.path.join(folder, limit)) as most, open(os.path.join(folder, used)) as now:
                free = min(free, max(0, int(most.read()) - int(now.read())))
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
    return free
