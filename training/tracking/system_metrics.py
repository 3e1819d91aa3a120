"""System metrics of a run, under the names that MLflow's page for them knows, taken by the sender's process.

MLflow's own SystemMetricsMonitor sends what it measures by itself and stops for good at the first lost call; here its
probes are read, and what they say goes to a journal like everything else.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from training.tracking.journal import Journal

FIRST_S = 2.0
EVERY_S = 10.0


class SystemMetrics:
    """Samples the machine and the process tree of the training process.

    Metrics, each with the prefix system/: those of MLflow (cpu_utilization_percentage, system_memory_usage_megabytes,
    disk_usage_megabytes, network_receive_megabytes, ..., gpu_0_utilization_percentage where nvidia-ml-py is installed)
    and training_memory_megabytes (resident memory of the training process and all its children), training_processes.
    """

    def __init__(self, path: Path, process_id: int) -> None:
        self._path = path
        self._process_id = process_id
        self._journal: Journal | None = None
        self._probes: list[Any] = []
        self._due_s = time.monotonic() + FIRST_S
        self._step = 0
        self._failed = False

    def sample_when_due(self) -> None:
        """Append one sample if EVERY_S have passed; whatever fails here ends the sampling, not the sender."""
        if self._failed or time.monotonic() < self._due_s:
            return
        try:
            if self._journal is None:
                self._journal = Journal(self._path)
                self._step = self._journal.last_step + 1
                self._probes = _probes()
                time.sleep(0.05)
            self._journal.metrics(
                {f"system/{name}": value for name, value in self._sample().items()}, self._step
            )
        except Exception:
            self._failed = True
        self._step += 1
        self._due_s = time.monotonic() + EVERY_S

    def _sample(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for probe in self._probes:
            probe.collect_metrics()
            values |= probe.aggregate_metrics()
            probe.clear_metrics()
        return values | _of_processes(self._process_id)


def _probes() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    CPUMonitor().collect_metrics()  # psutil's first answer has no interval to speak of
    probes: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        probes.append(GPUMonitor())
    except Exception:  # no nvidia-ml-py, or no GPU
        return probes
    return probes


def _of_processes(process_id: int) -> dict[str, float]:
    import psutil

    resident_bytes = count = 0
    try:
        root = psutil.Process(process_id)
        for process in [root, *root.children(recursive=True)]:
            if process.pid == os.getpid():  # the sender that measures this
                continue
            try:
                resident_bytes += process.memory_info().rss
                count += 1
            except psutil.NoSuchProcess:
                continue
    except psutil.NoSuchProcess:
        return {}
    return {"training_memory_megabytes": resident_bytes / 1e6, "training_processes": count}
