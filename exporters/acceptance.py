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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporters.errors import RefusedError
from exporters.formats.interface import Artifact, Runner, ServedFormat
from exporters.parity import Parity, one_torch_thread
from exporters.tolerances import TOLERANCES

ACCEPTED = "accepted"
UNPROVEN = "unproven"
_ROUNDS = 7
_ROUND_S = 0.15


@dataclass(frozen=True)
class Speed:
    """Images a second of an artefact and of FP32, one thread, timed turn by turn.

    Attributes:
        batch: tiles an execution.
        images_per_s: of the artefact; the median over rounds.
        fp32_images_per_s: of the FP32 artefact.
        machine: what they ran on.
    """

    batch: int
    images_per_s: float
    fp32_images_per_s: float
    machine: str

    @property
    def ratio(self) -> float:
        """How many times as fast as FP32."""
        return self.images_per_s / self.fp32_images_per_s


@dataclass(frozen=True)
class Acceptance:
    """The verdict over one artefact.

    Attributes:
        status: "accepted" or "unproven".
        reasons: why it is unproven.
        speed: against FP32; None for FP32 itself and where it could not be measured.
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
    reasons = []
    here = fmt.unproven_here()
    if here is not None:
        reasons.append(here)
    if not TOLERANCES[fmt.precision].must_win:
        return Acceptance(UNPROVEN if reasons else ACCEPTED, tuple(reasons))
    if measured is not None and measured.patient_auc is None:
        reasons.append(
            "the patients' AUC could not be compared, because the tiles have no labels or one class only; give the "
            "data set or tile store with --tiles"
        )
    if baseline is None:
        raise ValueError(f"{fmt.name} is not FP32 and was given nothing to beat")
    fp32, fp32_run = baseline
    speed = None
    problems = []
    if artifact.size_bytes >= fp32.size_bytes:
        problems.append(f"it has {artifact.size_bytes:,} bytes, FP32 {fp32.size_bytes:,}: it is not smaller")
    if here is None and run is not None and fp32_run is not None:
        speed = compare_speed(run, fp32_run, tiles_NHWC, batch=max_batch)
        if speed.ratio <= 1.0:
            problems.append(
                f"it answers {speed.images_per_s:.1f} images/s, FP32 {speed.fp32_images_per_s:.1f} at batch "
                f"{speed.batch} on {speed.machine}: it is not faster"
            )
    if problems:
        raise RefusedError(
            f"{fmt.name} is refused: {'; '.join(problems)}. Serve {fmt.baseline} instead. Nothing was published."
        )
    return Acceptance(UNPROVEN if reasons else ACCEPTED, tuple(reasons), speed, fp32.size_bytes)


def compare_speed(run: Runner, fp32_run: Runner, tiles_NHWC: np.ndarray, *, batch: int) -> Speed:
    """Time an artefact and FP32 on the same tiles in turns, so that what else the machine does meets both."""
    tiles = np.ascontiguousarray(tiles_NHWC[np.arange(batch) % len(tiles_NHWC)])
    rates: tuple[list[float], list[float]] = ([], [])
    with one_torch_thread():
        times = []
        for runner in (run, fp32_run):
            runner(tiles)
            started_s = time.perf_counter()
            runner(tiles)
            times.append(time.perf_counter() - started_s)
        for _ in range(_ROUNDS):
            for runner, took_s, found in zip((run, fp32_run), times, rates, strict=True):
                executions = max(1, round(_ROUND_S / max(took_s, 1e-6)))
                started_s = time.perf_counter()
                for _ in range(executions):
                    runner(tiles)
                found.append(executions * batch / (time.perf_counter() - started_s))
    ours, fp32 = (round(statistics.median(found), 2) for found in rates)
    return Speed(batch, ours, fp32, machine_name())


def machine_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU of this machine and how many cores it has."""
    model = platform.machine()
    try:
        line = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        model = line.partition(":")[2].strip()
    except (OSError, StopIteration):
        pass
    return f"{model}, {os.cpu_count()} cores"
