"""How fast training is, what it waits for, and how much memory it takes."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import torch


@dataclasses.dataclass
class Throughput:
    """Counts of one epoch on this process; times are wall clock, in seconds.

    Attributes:
        items: items that were learnt from.
        steps: steps of the optimiser.
        training_s: from the first batch to the last step, saving and answering left out.
        waiting_s: of that, waiting for the loader.
    """

    items: int = 0
    steps: int = 0
    training_s: float = 0.0
    waiting_s: float = 0.0

    def __post_init__(self) -> None:
        self._running_since_s: float | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time inside the block counts as training."""
        self._running_since_s = time.perf_counter()
        try:
            yield
        finally:
            self._stop()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside this block, within a block of `running`, does not."""
        self._stop()
        try:
            yield
        finally:
            self._running_since_s = time.perf_counter()

    def _stop(self) -> None:
        if self._running_since_s is not None:
            self.training_s += time.perf_counter() - self._running_since_s
            self._running_since_s = None

    def waited(self, since_s: float) -> None:
        """The loader has been waited for since `since_s` of time.perf_counter."""
        self.waiting_s += time.perf_counter() - since_s

    def count(self, items: int, moved: bool) -> None:
        """A batch is done, and with it perhaps a step."""
        self.items += items
        self.steps += moved

    def told(self, processes: int) -> dict[str, float]:
        """images_per_s of all processes, step_s, data_wait_share (0..1): for the history and the trackers."""
        running_s = 0.0 if self._running_since_s is None else time.perf_counter() - self._running_since_s
        training_s = max(self.training_s + running_s, 1e-9)
        return {
            "images_per_s": processes * self.items / training_s,
            "step_s": training_s / max(1, self.steps),
            "data_wait_share": min(1.0, self.waiting_s / training_s),
        }


def memory(device: torch.device) -> dict[str, float]:
    """rss_bytes and peak_rss_bytes of this process, cuda_peak_bytes where it has a GPU.

    The peak is the kernel's VmHWM: getrusage's would count the process that this one was forked from.
    """
    told = {"rss_bytes": float(psutil.Process().memory_info().rss)}
    status = Path("/proc/self/status")
    if status.is_file():
        for line_of_status in status.read_text().splitlines():
            if line_of_status.startswith("VmHWM:"):
                told["peak_rss_bytes"] = float(line_of_status.split()[1]) * 1024
    if device.type == "cuda":
        told["cuda_peak_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return told


def line(entry: Mapping[str, float], epochs: int) -> str:
    """An epoch of the history for the log."""
    timed = {"images_per_s", "step_s", "data_wait_share", "epoch", "learning_rate"}
    scores = "  ".join(
        f"{name.replace('_', ' ')} {value:.4g}"
        for name, value in entry.items()
        if name not in timed and not name.endswith("_bytes")
    )
    peak_bytes = entry.get("cuda_peak_bytes", entry.get("peak_rss_bytes", entry["rss_bytes"]))
    return (
        f"epoch {entry['epoch']:.0f} of {epochs}: {scores}  {entry['images_per_s']:.0f} images/s  "
        f"{1000 * entry['step_s']:.3g} ms a step  {100 * entry['data_wait_share']:.0f}% of it waiting for data  "
        f"{peak_bytes / 2**30:.2f} GiB at most"
    )
