"""What a supervisor knows of its server, as Prometheus text: `GET /metrics` on the health port (docs/metrics.md).

All is gathered on the supervisor's rounds; a GET only formats it, so that asking costs the server nothing.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from serving.drift_reference import Sample, reference_samples, without_repeats
from serving.health import Health
from serving.processes import memory_bytes, processes_of
from serving.releases.errors import ReleaseError
from serving.releases.live import STATE, Live, live_directory_of
from slides.model_metrics import public_name

LOOK_EVERY_S = 1.0
MEMORY_EVERY_S = 30.0

DESCRIPTIONS = {
    "clotline_ready": ("gauge", "1 while every public model was proven lately and no stub is missing"),
    "clotline_model_ready": ("gauge", "1 while the public model was proven lately"),
    "clotline_server_restarts_total": ("counter", "Times that tritonserver was started again"),
    "clotline_model_replacements_total": ("counter", "Times that a model was loaded anew because a stub died"),
    "clotline_memory_bytes": ("gauge", "Proportional memory of tritonserver, its stubs and its guardian"),
    "clotline_release_info": ("gauge", "1; labels say which release answers for a public model"),
    "clotline_release_switch_timestamp_seconds": ("gauge", "When the serving release began to answer"),
    "clotline_reference_share": ("gauge", "Share of a bucket in the release's reference profile"),
    "clotline_reference_count": ("gauge", "Tiles or slides of the reference profile"),
    "clotline_reference_patients": ("gauge", "Patients of the reference profile"),
}  # fmt: skip


class SupervisorMetrics:
    """Gathers and formats. Safe for several threads.

    Args:
        health: of the same supervisor.
        repository: that the server serves.
        instance_id: of the server, whose processes are weighed.
    """

    def __init__(self, health: Health, repository: Path, instance_id: str) -> None:
        self._health, self._instance_id = health, instance_id
        self._live = live_directory_of(repository)
        self._lock = threading.Lock()
        self._models: dict[str, list[Sample]] = {}
        self._configs: dict[str, tuple[dict[str, Any], int]] = {}
        self._memory_bytes: int | None = None
        self._switched_at_s: float | None = None
        self._live_changed_ns = 0
        self._looked_s = self._weighed_s = -MEMORY_EVERY_S

    def look(self, public: Mapping[str, tuple[dict[str, Any], int]] | None) -> None:
        """Gather what is due.

        Args:
            public: public models: name -> configuration and version; None where it is not known at the moment.
        """
        now_s = time.monotonic()
        if now_s - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = now_s
        if public is not None and public != self._configs:
            models = {name: _of_model(name, *entry) for name, entry in public.items()}
            with self._lock:
                self._configs, self._models = dict(public), models
        self._read_switch()
        if now_s - self._weighed_s >= MEMORY_EVERY_S:
            self._weighed_s = now_s
            self._memory_bytes = memory_bytes(processes_of(self._instance_id))

    def _read_switch(self) -> None:
        if self._live is None:
            return
        with contextlib.suppress(OSError, ReleaseError, ValueError):
            changed_ns = (self._live / STATE).stat().st_mtime_ns
            if changed_ns != self._live_changed_ns:
                serving = Live(self._live).read().serving
                self._switched_at_s = (
                    datetime.fromisoformat(serving.since_utc).timestamp() if serving else None
                )
                self._live_changed_ns = changed_ns

    def text(self) -> str:
        """Prometheus text of this moment."""
        return exposition(self._samples())

    def _samples(self) -> list[Sample]:
        _, told = self._health.readiness()
        with self._lock:
            models = dict(self._models)
        ready = {name: condition["ready"] for name, condition in told["models"].items()}
        found: list[Sample] = [("clotline_ready", {}, told["ready"])]
        found += [
            ("clotline_model_ready", {"model": name}, told["server"]["ready"] and ready.get(name, False))
            for name in sorted({*ready, *models})
        ]
        found.append(("clotline_server_restarts_total", {}, told["restarts"]["server"]))
        replaced: dict[str, int] = {}
        for name, count in told["restarts"]["models"].items():
            replaced[public_name(name)] = replaced.get(public_name(name), 0) + count
        found += [("clotline_model_replacements_total", {"model": name}, n) for name, n in replaced.items()]
        if self._memory_bytes is not None:
            found.append(("clotline_memory_bytes", {}, self._memory_bytes))
        if self._switched_at_s is not None:
            found.append(("clotline_release_switch_timestamp_seconds", {}, self._switched_at_s))
        found += without_repeats(models[name] for name in sorted(models))
        return found


def _of_model(name: str, config: dict[str, Any], version: int) -> list[Sample]:
    parameters = {key: entry.get("string_value", "") for key, entry in config.get("parameters", {}).items()}
    form = ""
    with contextlib.suppress(ValueError, AttributeError):
        form = str(json.loads(parameters.get("clotline_checkpoint", "{}")).get("format", ""))
    labels = {
        "model": name,
        "release_id": parameters.get("clotline_release", ""),
        "number": str(version),
        "format": form,
    }
    return [("clotline_release_info", labels, 1), *reference_samples(name, parameters)]


def exposition(samples: Iterable[Sample]) -> str:
    """Prometheus text format 0.0.4, the samples of a metric together."""
    by_name: dict[str, list[str]] = {}
    for name, labels, value in samples:
        said = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items() if text != "")
        by_name.setdefault(name, []).append(
            f"{name}{{{said}}} {float(value)!r}" if said else f"{name} {float(value)!r}"
        )
    lines = []
    for name, own in by_name.items():
        kind, description = DESCRIPTIONS[name]
        lines += [f"# HELP {name} {description}.", f"# TYPE {name} {kind}", *own]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
