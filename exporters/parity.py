"""The parity gate: an artefact is published only if it answers as PyTorch does on real tiles.

The reference is `training.network.ServedNetwork`, which shares no code with `exporters.served_graph`. Both see the
same tiles, decoded by `slides.decode`. Three things are compared, at each batch size:

- probabilities, to 1e-4;
- their logarithms, to 1e-2: a network that is sure of itself answers 0.99999 whatever is done to its input, and
  only the logarithm of the small probabilities tells;
- labels, exactly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from exporters.errors import GoldenTilesError, ParityError
from exporters.formats.interface import Answer, Runner
from slides.decode import decode_tile
from slides.errors import TileDecodeError
from training.network import ServedNetwork, TileNetwork

PROBABILITY_TOLERANCE = 1e-4
LOG_PROBABILITY_TOLERANCE = 1e-2
_SMALLEST_PROBABILITY = 1e-12
_TILE_SUFFIXES = (".jpg", ".jpeg", ".png")
_REFERENCE_BATCH = 16


@dataclass(frozen=True)
class Parity:
    """How closely an artefact follows PyTorch.

    Attributes:
        tiles: number of tiles compared at each batch size.
        batches: batch sizes.
        max_abs_diff: largest difference of a probability.
        max_log_diff: largest difference of a probability's natural logarithm.
    """

    tiles: int
    batches: tuple[int, ...]
    max_abs_diff: float
    max_log_diff: float


def decode_golden_tiles(encoded: Sequence[tuple[str, bytes]], size_px: int) -> np.ndarray:
    """Decode tiles as the server does.

    Args:
        encoded: name (for errors) and bytes of each tile.
        size_px: side S of the network's input.

    Returns:
        uint8 [N, S, S, 3] RGB, N >= 1.

    Raises:
        GoldenTilesError: there is none, or one of them is no tile.
    """
    if not encoded:
        raise GoldenTilesError(
            "The checkpoint holds no golden tiles, and without real tiles nothing can be compared. "
            "Give a directory of JPEG or PNG tiles with --tiles."
        )
    decoded = []
    for name, data in encoded:
        try:
            decoded.append(decode_tile(data, size_px))
        except TileDecodeError as error:
            raise GoldenTilesError(
                f"{name} is no tile: {error}. Remove it, or give others with --tiles."
            ) from error
    return np.stack(decoded)


def read_tiles(directory: Path) -> list[tuple[str, bytes]]:
    """Names and bytes of the JPEG and PNG files of a directory, in the order of their names.

    Raises:
        GoldenTilesError: it is missing or unreadable, or holds no such file.
    """
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix.lower() in _TILE_SUFFIXES)
        tiles = [(str(path), path.read_bytes()) for path in paths]
    except OSError as error:
        raise GoldenTilesError(
            f"The directory of tiles {directory} cannot be read: {error.strerror}. Name one with JPEG or PNG tiles."
        ) from error
    if not tiles:
        raise GoldenTilesError(
            f"{directory} holds no JPEG or PNG file. Name a directory with tiles as --tiles."
        )
    return tiles


def reference_answer(network: TileNetwork, tiles_NHWC: np.ndarray) -> Answer:
    """What PyTorch answers.

    Args:
        network: in evaluation mode, on the CPU.
        tiles_NHWC: uint8 [N, S, S, 3] RGB.

    Raises:
        ParityError: the network answers with values that are not finite, or the same to all tiles: comparing
            with a constant proves nothing.
    """
    served = ServedNetwork(network).eval()
    with _one_thread(), torch.inference_mode():
        parts = [served(tiles) for tiles in torch.from_numpy(tiles_NHWC).split(_REFERENCE_BATCH)]
    answer = Answer(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))
    if not np.isfinite(answer.probabilities).all():
        raise ParityError(
            "The network itself answers with values that are not finite on the golden tiles; its weights are broken. "
            "Train again. Nothing was published."
        )
    spread = float(np.ptp(_log(answer.probabilities), axis=0).max())
    if spread <= LOG_PROBABILITY_TOLERANCE:
        raise ParityError(
            f"The network gives the same answer to all {len(tiles_NHWC)} golden tiles (logarithms of probabilities "
            f"vary by {spread:.3g}), so that a fault of the artefact could not be seen. Is it trained? Otherwise give "
            "tiles that differ with --tiles. Nothing was published."
        )
    return answer


def check_parity(
    format_name: str, run: Runner, tiles_NHWC: np.ndarray, expected: Answer, *, max_batch: int
) -> Parity:
    """Compare an artefact with PyTorch on all tiles, at batch 1, 2 and `max_batch`.

    Args:
        format_name: for the errors.
        run: the artefact.
        tiles_NHWC: uint8 [N, S, S, 3] RGB; taken again from the start where a batch needs more of them.
        expected: PyTorch's answer to the same tiles.
        max_batch: the largest batch that will be served.

    Raises:
        ParityError: an answer is missing, of another shape or dtype, not finite, or differs.
    """
    batches = tuple(sorted({size for size in (1, 2, max_batch) if size <= max_batch}))
    max_abs_diff = max_log_diff = 0.0
    with _one_thread():
        for size in batches:
            for indices in _batches(len(tiles_NHWC), size):
                where = f"{format_name}, batch {size}, tiles {indices[0]} to {indices[-1]}"
                theirs = _run(run, np.ascontiguousarray(tiles_NHWC[indices]), where)
                ours = Answer(*(column[indices] for column in expected))
                abs_diff, log_diff = _differences(theirs, ours, where)
                max_abs_diff, max_log_diff = max(max_abs_diff, abs_diff), max(max_log_diff, log_diff)
    return Parity(len(tiles_NHWC), batches, max_abs_diff, max_log_diff)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    # As each instance is served; and threads of torch that spin for a busy core make small batches ten times slower.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _batches(count: int, size: int) -> Iterator[np.ndarray]:
    for start in range(0, count, size):
        yield np.arange(start, start + size) % count


def _run(run: Runner, tiles_NHWC: np.ndarray, where: str) -> Answer:
    try:
        return run(tiles_NHWC)
    except Exception as error:  # each runtime has errors of its own
        lines = str(error).strip().splitlines() or ["(no message)"]
        raise ParityError(
            f"{where}: the artefact fails where PyTorch answers ({type(error).__name__}: {lines[-1]}). "
            "Is its batch dimension frozen? Nothing was published."
        ) from error


def _differences(theirs: Answer, ours: Answer, where: str) -> tuple[float, float]:
    for name, got, wanted in zip(Answer._fields, theirs, ours, strict=True):
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            raise ParityError(
                f"{where}: {name} is {got.dtype} {list(got.shape)}, expected {wanted.dtype} {list(wanted.shape)}. "
                "Nothing was published."
            )
    if not (np.isfinite(theirs.probabilities).all() and np.isfinite(theirs.confidence).all()):
        raise ParityError(
            f"{where}: the artefact answers with values that are not finite. Nothing was published."
        )
    abs_diff = max(
        float(np.abs(theirs.probabilities - ours.probabilities).max()),
        float(np.abs(theirs.confidence - ours.confidence).max()),
    )
    log_diff = float(np.abs(_log(theirs.probabilities) - _log(ours.probabilities)).max())
    wrong_labels = int((theirs.label_index != ours.label_index).sum())
    if abs_diff > PROBABILITY_TOLERANCE or log_diff > LOG_PROBABILITY_TOLERANCE or wrong_labels:
        raise ParityError(
            f"{where}: probabilities differ from PyTorch by up to {abs_diff:.3g} (allowed {PROBABILITY_TOLERANCE:g}), "
            f"their logarithms by {log_diff:.3g} (allowed {LOG_PROBABILITY_TOLERANCE:g}), {wrong_labels} labels of "
            f"{len(ours.label_index)} differ. Nothing was published."
        )
    return abs_diff, log_diff


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities.astype(np.float64), _SMALLEST_PROBABILITY))
