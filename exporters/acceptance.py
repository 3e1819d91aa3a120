"""Whether an artefact that answers well enough is worth serving: accepted, unproven, or refused.

FP32 formats need the parity gate only. One of a lower precision loses something, so it has to be smaller and, on the
kind of machine it is meant for, faster than FP32, timed turn by turn in the same run. What this machine cannot show is
not guessed: the format is unproven, and is never published unless that is asked for by name.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from exporters.errors import RefusedError
from exporters.formats.interface import Artifact, Runner, ServedFormat
from exporters.parity import Parity, one_torch_thread
from exporters.tolerances import TOLERANCES

ACCEPTED = "accepted"
UNPROVEN = "unproven"
_ROUNDS = 7
_ROUNDS_ALONE = 3
_ROUND_S = 0.15


@dataclass(frozen=True)
class Speed:
    """Images a second of an artefact, one thread; of a lower precision turn by turn with FP32.

    Attributes:
        batch: tiles an execution.
        images_per_s: of the artefact; the median over rounds.
        fp32_images_per_s: of the FP32 artefact that it has to beat; None for FP32 itself.
        machine: what they ran on.
    """

    batch: int
    images_per_s: float
    fp32_images_per_s: float | None
    machine: str

    @property
    def ratio(self) -> float | None:
        """How many times as fast as FP32; None for FP32 itself."""
        return None if self.fp32_images_per_s is None else self.images_per_s / self.fp32_images_per_s


@dataclass(frozen=True)
class Acceptance:
    """The verdict over one artefact.

    Attributes:
        status: "accepted" or "unproven".
        reasons: why it is unproven.
        speed: None where it does not run on the kind of machine that it is meant for.
        fp32_bytes: size of the FP32 artefact; None for FP32 itself.
    """

    status: str
    reasons: tuple[str, ...] = ()
    speed: Speed | None = None
    fp32_bytes: int | None = None


def judge(
    fmt: ServedFormat,
    artifact: Artifact,
    measured: Parity | None,
    *,
    run: Runner | None,
    baseline: tuple[Artifact, Runner | None] | None,
    tiles_NHWC: np.ndarray,
    max_batch: int,
) -> Acceptance:
    """Accept an artefact, or say what is unproven about it.

    Args:
        measured: what the parity gate measured; None where the artefact does not run on this machine.
        run: the artefact; None where it does not run on this machine.
        baseline: the FP32 artefact that it has to beat, and its runner if it runs here; None for FP32 formats.
        tiles_NHWC: uint8 [N, S, S, 3] RGB, timed with.

    Raises:
        RefusedError: not smaller, or not faster, than FP32.
    """
    here = fmt.unproven_here()
    reasons = [] if here is None else [here]
    speed = speed_of(fmt, run, baseline[1] if baseline else None, tiles_NHWC, max_batch=max_batch)
    if not TOLERANCES[fmt.precision].must_win:
        return Acceptance(UNPROVEN if reasons else ACCEPTED, tuple(reasons), speed)
    if measured is not None and measured.patient_auc is None:
        reasons.append(
            "the patients' AUC could not be compared, because the tiles have no labels or one class only; give the "
            "data set or tile store with --tiles"
        )
    if baseline is None:
        raise ValueError(f"{fmt.name} is not FP32 and was given nothing to beat")
    fp32 = baseline[0]
    problems = []
    if artifact.size_bytes >= fp32.size_bytes:
        problems.append(f"it has {artifact.size_bytes:,} bytes, FP32 {fp32.size_bytes:,}: it is not smaller")
    if speed is not None and speed.ratio is not None and speed.ratio <= 1.0:
        problems.append(
            f"it answers {speed.images_per_s:.1f} images/s, FP32 {speed.fp32_images_per_s:.1f} at batch "
            f"{speed.batch} on {speed.machine}: it is not faster"
        )
    if problems:
        raise RefusedError(
            f"{fmt.name} is refused: {'; '.join(problems)}. Serve {fmt.baseline} instead. Nothing was published.",
            measured=measured,
            speed=speed,
        )
    return Acceptance(UNPROVEN if reasons else ACCEPTED, tuple(reasons), speed, fp32.size_bytes)


def speed_of(
    fmt: ServedFormat, run: Runner | None, fp32_run: Runner | None, tiles_NHWC: np.ndarray, *, max_batch: int
) -> Speed | None:
    """How fast an artefact is on the kind of machine that it is meant for; None where that is another one.

    Args:
        run: the artefact; None where it does not run on this machine.
        fp32_run: what it has to beat, on the same device; None for FP32.
    """
    must_win = TOLERANCES[fmt.precision].must_win
    if run is None or (must_win and fp32_run is None):
        return None
    if fmt.machine == "gpu" and fmt.unproven_here() is not None:
        return None  # what is meant for a GPU is timed on a GPU or not at all
    runners = [run, fp32_run] if must_win and fp32_run is not None else [run]
    machine = machine_name(gpu=fmt.machine == "gpu")
    return measure_speed(runners, tiles_NHWC, batch=max_batch, machine=machine)


def measure_speed(runners: Sequence[Runner], tiles_NHWC: np.ndarray, *, batch: int, machine: str) -> Speed:
    """Time an artefact, and FP32 where it has to beat that, on the same tiles.

    Args:
        runners: the artefact, and FP32 or nothing: in turns, so that what else the machine does meets both.
        tiles_NHWC: uint8 [N, S, S, 3] RGB; taken again from the start where a batch needs more of them.
        batch: tiles an execution.
        machine: what they run on.
    """
    tiles = np.ascontiguousarray(tiles_NHWC[np.arange(batch) % len(tiles_NHWC)])
    rates: list[list[float]] = [[] for _ in runners]
    with one_torch_thread():
        times = []
        for runner in runners:
            runner(tiles)
            started_s = time.perf_counter()
            runner(tiles)
            times.append(time.perf_counter() - started_s)
        for _ in range(_ROUNDS if len(runners) > 1 else _ROUNDS_ALONE):
            for runner, took_s, found in zip(runners, times, rates, strict=True):
                executions = max(1, round(_ROUND_S / max(took_s, 1e-6)))
                started_s = time.perf_counter()
                for _ in range(executions):
                    runner(tiles)
                found.append(executions * batch / (time.perf_counter() - started_s))
    ours, *fp32 = (round(statistics.median(found), 2) for found in rates)
    return Speed(batch, ours, fp32[0] if fp32 else None, machine)


def machine_name(cpuinfo: Path = Path("/proc/cpuinfo"), *, gpu: bool = False) -> str:
    """The CPU of this machine and how many cores it has; with `gpu` its first GPU."""
    if gpu and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.machine()
    try:
        line = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        model = line.partition(":")[2].strip()
    except (OSError, StopIteration):
        pass
    return f"{model}, {os.cpu_count()} cores"
