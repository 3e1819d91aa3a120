"""What a served model counts of its own work, for Triton's `/metrics`. Used by code that runs in Triton's Python stubs.

A call of a Triton metric is a message from the stub to tritonserver and back (docs/metrics.md). So a model counts in plain
numbers, and a thread tells Triton now and then what was added (counters every COUNTS_EVERY_S, histograms, which have many
series, every HISTOGRAMS_EVERY_S), for all stubs that have a series of the same name and labels. Histograms are counters `<name>_bucket` with the label `le`, `<name>_sum` and `<name>_count`, because
Triton's own kind takes one value a call. Series stay in Triton when their stub ends: nothing here ever deletes one.
A problem with metrics is logged once and never reaches a request.
"""

from __future__ import annotations

import json
import re
import threading
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from slides.appearance import CONFIDENCE_EDGES

COUNTS_EVERY_S = 1.0
HISTOGRAMS_EVERY_S = 5.0
CLOSING_S = 2.0

PROBE_ID = "clotline-probe"
"""Id of a request that is asked to see whether a model works. It is answered and not counted."""

ANSWERS_FOR = "clotline_answers_for"
"""Parameter of a network: which public model its answers are, and the classes. JSON, because a live server renames a
parameter whose whole value is the name of a model."""

BAG_EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
DECODE_EDGES_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)

_KEPT: list[
    Any
] = []  # families and metrics, for as long as the process lives: deleting one removes it for all stubs
_RELEASE = re.compile(r"__r[0-9]+$")


def public_name(model: str) -> str:
    """Name of a model without the release that a live server adds to it: `tile_preprocess__r7` -> `tile_preprocess`."""
    return _RELEASE.sub("", model)


def is_probe(request: Any) -> bool:
    """True for a request of a supervisor or a check, which is not counted."""
    return bool(request.request_id() == PROBE_ID)


class Count:
    """A number that grows. It has one writer."""

    def __init__(self) -> None:
        self.value: float = 0

    def add(self, more: float = 1) -> None:
        """Count `more`."""
        self.value += more

    def values(self) -> list[float]:
        """As told to Triton."""
        return [self.value]


class Histogram:
    """How often values fell below each edge. It has one writer.

    Args:
        edges: rising; the last bucket, +Inf, is added.
    """

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = tuple(edges)
        self.counts = [0] * (len(self.edges) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count a value; it must not be below 0."""
        self.counts[bisect_left(self.edges, value)] += 1
        self.sum += value

    def values(self) -> list[float]:
        """Buckets, each with all below it, then sum and count, as told to Triton."""
        found: list[float] = []
        below = 0
        for count in self.counts:
            below += count
            found.append(below)
        return [*found, self.sum, below]


class ModelMetrics:
    """All that one model instance counts.

    Args:
        pb_utils: Triton's `triton_python_backend_utils`.
        instance: name for the log.
    """

    def __init__(self, pb_utils: Any, instance: str) -> None:
        self._pb_utils, self._instance = pb_utils, instance
        self._families: dict[str, Any] = {}
        self._wanted: list[tuple[Count | Histogram, list[tuple[str, str, dict[str, str]]]]] = []
        self._shown: list[tuple[Count | Histogram, list[Any], list[float]]] = []
        self._problem_told = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def count(self, name: str, description: str, labels: Mapping[str, str]) -> Count:
        """A counter."""
        count = Count()
        self._wanted.append((count, [(name, description, dict(labels))]))
        return count

    def histogram(
        self, name: str, description: str, labels: Mapping[str, str], edges: Sequence[float]
    ) -> Histogram:
        """A histogram."""
        histogram = Histogram(edges)
        series = [
            (f"{name}_bucket", f"{description}: values up to le", {**labels, "le": str(edge)})
            for edge in (*edges, "+Inf")
        ]
        series += [(f"{name}_{what}", f"{description}: {what}", dict(labels)) for what in ("sum", "count")]
        self._wanted.append((histogram, series))
        return histogram

    def show(self) -> None:
        """Begin to tell Triton; every series is there with 0 first. Counts and histograms must have been made before."""
        self._thread.start()

    def close(self) -> None:
        """Tell the rest, at the end of the model."""
        self._closing.set()
        self._thread.join(CLOSING_S)

    def _run(self) -> None:
        try:
            for instrument, series in self._wanted:
                metrics = [self._metric(*each) for each in series]
                _KEPT.extend(metrics)
                self._shown.append((instrument, metrics, [0.0] * len(metrics)))
        except Exception as error:  # whatever it is, requests go on; never tried again (docs/metrics.md)
            self._say(error)
        closing, histograms_at_s = False, time.monotonic()
        while not closing:
            closing = self._closing.wait(COUNTS_EVERY_S)
            everything = closing or time.monotonic() - histograms_at_s >= HISTOGRAMS_EVERY_S
            try:
                self._tell(everything)
                if everything:
                    histograms_at_s = time.monotonic()
            except Exception as error:
                self._say(error)

    def _metric(self, name: str, description: str, labels: dict[str, str]) -> Any:
        if name not in self._families:
            self._families[name] = self._pb_utils.MetricFamily(
                name=name, description=description, kind=self._pb_utils.MetricFamily.COUNTER
            )
            _KEPT.append(self._families[name])
        return self._families[name].Metric(labels=labels)

    def _tell(self, everything: bool) -> None:
        for instrument, metrics, told in self._shown:
            if not everything and isinstance(instrument, Histogram):
                continue
            values = instrument.values()
            for place in reversed(
                range(len(values))
            ):  # a bucket is never above the next one, whoever looks between
                value = values[place]
                more = value - told[place]
                if more > 0:
                    metrics[place].increment(more)
                    told[place] = value
                    time.sleep(0)  # requests first: the call keeps Python's lock while it waits for Triton

    def _say(self, error: Exception) -> None:
        if self._problem_told:
            return
        self._problem_told = True
        message = f"{self._instance}: metrics are incomplete, requests are not affected: {error!r}"
        try:
            self._pb_utils.Logger.log_warn(message)
        except Exception:
            print(message, flush=True)


class Predictions:
    """Predictions of one public model, by class."""

    def __init__(self, metrics: ModelMetrics, model: str, classes: Sequence[str]) -> None:
        self._counts = []
        self._confidences = []
        for name in classes:
            labels = {"model": model, "class": name}
            self._counts.append(
                metrics.count(
                    "clotline_predictions_total", "Answers by the class with the highest probability", labels
                )
            )
            self._confidences.append(
                metrics.histogram("clotline_prediction_confidence", "Probability of the predicted class", labels,
                                  CONFIDENCE_EDGES)
            )  # fmt: skip

    def add(self, label_index: int, confidence: float) -> None:
        """Count an answer. One that is no number of a class is none."""
        if 0 <= label_index < len(self._counts) and confidence >= 0:
            self._counts[label_index].add()
            self._confidences[label_index].add(confidence)


class NetworkPredictions:
    """Predictions of a network that answers for a public model; counted by the backend that runs it."""

    def __init__(self, pb_utils: Any, instance: str, config: Mapping[str, Any], answers_for: str) -> None:
        """See `network_predictions`."""
        told = json.loads(answers_for)
        model, classes = str(told["model"]), [str(name) for name in told["classes"]]
        _, self._confidence, self._label_index = [entry["name"] for entry in config["output"]]
        # Triton runs each of them once, before any other request.
        self._warm_ups = sum(max(1, int(entry.get("count", 1))) for entry in config.get("model_warmup") or [])
        self._metrics = ModelMetrics(pb_utils, instance)
        self._predictions = Predictions(self._metrics, public_name(model), classes)
        self._metrics.show()

    def add(self, requests: Sequence[Any], tiles: Sequence[int], results: Mapping[str, Any]) -> None:
        """Count what an execution answered.

        Args:
            requests: of the execution.
            tiles: how many each of them has.
            results: name of an output -> array of all their tiles; not those that nobody wanted.
        """
        if self._warm_ups:
            self._warm_ups -= 1
            return
        if self._confidence not in results or self._label_index not in results:
            return
        confidences = results[self._confidence].reshape(-1).tolist()
        label_indices = results[self._label_index].reshape(-1).tolist()
        start = 0
        for request, count in zip(requests, tiles, strict=True):
            if not is_probe(request):
                for place in range(start, start + count):
                    self._predictions.add(label_indices[place], confidences[place])
            start += count

    def close(self) -> None:
        """Tell the rest, at the end of the model."""
        self._metrics.close()


def network_predictions(pb_utils: Any, args: Mapping[str, str]) -> NetworkPredictions | None:
    """The predictions that a network is to count; None for one that answers for nobody.

    Args:
        pb_utils: Triton's `triton_python_backend_utils`.
        args: of the model's `initialize`. Outputs of the network are probabilities, confidence and label index, in this
            order.

    Raises:
        pb_utils.TritonModelException: the parameter ANSWERS_FOR is not what the exporter writes.
    """
    config = json.loads(args["model_config"])
    answers_for = config.get("parameters", {}).get(ANSWERS_FOR, {}).get("string_value", "")
    if not answers_for:
        return None
    try:
        return NetworkPredictions(pb_utils, args["model_instance_name"], config, answers_for)
    except (ValueError, KeyError, TypeError) as error:
        raise pb_utils.TritonModelException(
            f'{args["model_name"]}: {ANSWERS_FOR} must be {{"model": NAME, "classes": [NAME, ...]}} of a network with '
            f"three outputs, not {answers_for!r} ({error!r})"
        ) from error
