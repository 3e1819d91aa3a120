"""What Triton counted, read from its /metrics.

Counters: https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/metrics.html
"""

from __future__ import annotations

import dataclasses
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from demo.errors import DemoError

SETTLING_S = 0.25
COUNTERS = {
    "nv_inference_request_success": "requests",
    "nv_inference_request_failure": "failures",
    "nv_inference_count": "tiles",
    "nv_inference_exec_count": "executions",
    "nv_inference_request_duration_us": "request_us",
    "nv_inference_queue_duration_us": "queue_us",
    "nv_inference_compute_infer_duration_us": "infer_us",
}


@dataclasses.dataclass(frozen=True)
class ModelCounts:
    """Triton's counters of one model version, from the server's start or between two readings.

    Attributes:
        requests: answered; an ensemble passes each of its requests on to its parts, which count it too.
        failures: refused or failed; Triton counts a failed request of an ensemble twice.
        tiles: items inferred, the sum over all batches.
        executions: batches that the backend ran; of an ensemble, its requests.
        request_us, queue_us, infer_us: microseconds summed over the requests, from arrival to answer, waiting
            in the queue, and in the backend.
    """

    model: str
    version: str
    requests: int = 0
    failures: int = 0
    tiles: int = 0
    executions: int = 0
    request_us: float = 0.0
    queue_us: float = 0.0
    infer_us: float = 0.0

    @property
    def mean_request_ms(self) -> float | None:
        """Mean time from arrival to answer in milliseconds; None without a request."""
        return self.request_us / self.requests / 1000 if self.requests else None

    @property
    def mean_queue_ms(self) -> float | None:
        """Mean time in the queue in milliseconds; None without a request."""
        return self.queue_us / self.requests / 1000 if self.requests else None

    @property
    def mean_infer_ms(self) -> float | None:
        """Mean time in the backend in milliseconds; None without a request."""
        return self.infer_us / self.requests / 1000 if self.requests else None

    @property
    def mean_batch(self) -> float | None:
        """Mean tiles a batch that the backend ran; None without one."""
        return self.tiles / self.executions if self.executions else None

    def since(self, earlier: ModelCounts) -> ModelCounts:
        """What was counted after `earlier`."""
        change = {name: getattr(self, name) - getattr(earlier, name) for name in COUNTERS.values()}
        return dataclasses.replace(self, **change)


def scrape(url: str, timeout_s: float = 10.0) -> dict[tuple[str, str], ModelCounts]:
    """Counters of every model version, by (model, version).

    Raises:
        DemoError: no answer, or none that is Prometheus' text format.
    """
    if not url.startswith(("http://", "https://")):
        raise DemoError(f"metrics address {url!r} must start with http://")
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:  # nosec B310  # noqa: S310 (http, checked above)
            return parse(response.read().decode("utf-8"))
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise DemoError(f"cannot read Triton's metrics from {url}: {error}") from error


def settled(url: str, at_most_s: float = 5.0) -> dict[tuple[str, str], ModelCounts]:
    """Counters once they no longer change: Triton counts a request a moment after its answer went out.

    Raises:
        DemoError: as `scrape`.
    """
    give_up_s = time.monotonic() + at_most_s
    counts = scrape(url)
    while time.monotonic() < give_up_s:
        time.sleep(SETTLING_S)
        before, counts = counts, scrape(url)
        if counts == before:
            break
    return counts


def parse(text: str) -> dict[tuple[str, str], ModelCounts]:
    """Counters from Prometheus' text format; ValueError if it is something else."""
    values: dict[tuple[str, str], dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            field = COUNTERS.get(sample.name) or COUNTERS.get(sample.name.removesuffix("_total"))
            if field is None or "model" not in sample.labels:
                continue
            key = (sample.labels["model"], sample.labels.get("version", ""))
            of_model = values.setdefault(key, {})
            of_model[field] = (
                of_model.get(field, 0.0) + sample.value
            )  # summed over GPUs, where there are several
    return {key: _counts(key, fields) for key, fields in values.items()}


def _counts(key: tuple[str, str], fields: dict[str, float]) -> ModelCounts:
    whole: dict[str, Any] = {
        name: int(fields.get(name, 0)) for name in ("requests", "failures", "tiles", "executions")
    }
    times: dict[str, Any] = {name: fields.get(name, 0.0) for name in ("request_us", "queue_us", "infer_us")}
    return dataclasses.replace(ModelCounts(*key), **whole, **times)


def difference(
    before: dict[tuple[str, str], ModelCounts], after: dict[tuple[str, str], ModelCounts]
) -> list[ModelCounts]:
    """What was counted between two readings, by model name; models that nobody asked are left out."""
    changes: Iterable[ModelCounts] = (
        counts.since(before.get(key, ModelCounts(*key))) for key, counts in sorted(after.items())
    )
    return [change for change in changes if change.requests or change.failures]
