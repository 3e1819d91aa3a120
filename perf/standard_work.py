"""The standard work: what is measured on every machine, and how good it has to be. All bars of speed stand here."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Bar:
    """How good one figure of `bench` has to be: at least, or at most, `value`."""

    figure: str
    sign: str
    value: float

    def met(self, answer: Mapping[str, Any]) -> bool:
        """Whether an answer of `bench` reaches it."""
        compare = {">=": operator.ge, "<=": operator.le}[self.sign]
        return bool(compare(answer[self.figure], self.value))


@dataclass(frozen=True)
class Work:
    """One measurement of the standard work.

    Attributes:
        bar: number under which its bars are told (docs/performance.md).
        name: short, for tables and plots.
        title: what it is.
        architecture, formats: of the repository, as `perf models` takes them.
        classifier: the one measured.
        limit_classifier: the one whose network LIMIT runs, None for the same.
        concurrency: requests in flight, of which every number is measured.
        slides: whole slides are asked of slide_classifier (`perf slides`), not tiles (`perf bench`).
        bars: what it has to reach.
    """

    bar: str
    name: str
    title: str
    architecture: str
    formats: tuple[str, ...]
    classifier: str = "tile_classifier"
    limit_classifier: str | None = None
    concurrency: tuple[int, ...] = (8,)
    slides: bool = False
    bars: tuple[Bar, ...] = field(default_factory=tuple)


STANDARD_WORK = (
    Work(
        bar="1",
        name="resnet18",
        title="ResNet-18, FP32 ONNX, eight requests in flight",
        architecture="resnet18",
        formats=("onnx",),
        bars=(
            Bar("ratio_to_limit", ">=", 0.96),
            Bar("p95_to_mean", "<=", 1.25),
            Bar("cpu_ratio", "<=", 1.05),
        ),
    ),
    Work(
        bar="2",
        name="resnet18-alone",
        title="ResNet-18, FP32 ONNX, one request at a time, against the soonest answer in-process",
        architecture="resnet18",
        formats=("onnx",),
        concurrency=(1,),
        bars=(Bar("latency_to_limit", "<=", 1.15),),
    ),
    Work(
        bar="1b",
        name="mobilenet-int8",
        title="MobileNetV3-Small, INT8 ONNX, eight requests in flight",
        architecture="mobilenet_v3_small",
        formats=("onnx-int8",),
        bars=(Bar("ratio_to_limit", ">=", 0.75),),
    ),
    Work(
        bar="3",
        name="resnet18-int8",
        title="ResNet-18, INT8 OpenVINO, against the limit of FP32 ONNX",
        architecture="resnet18",
        formats=("openvino-int8", "onnx"),
        limit_classifier="tile_classifier_onnx",
        bars=(Bar("ratio_to_limit", ">=", 3.0),),
    ),
    Work(
        bar="4",
        name="slides",
        title="slide_classifier over ResNet-18, FP32 ONNX, 16 tiles a slide, 8 and 64 slides in flight",
        architecture="resnet18",
        formats=("onnx",),
        classifier="slide_classifier",
        concurrency=(8, 64),
        slides=True,
        bars=(Bar("ratio_to_limit", ">=", 0.95),),
    ),
)
