"""The standard work: what is measured on every machine, and how good it has to be. All bars of speed stand here.

LIMIT is always a bare loop of libjpeg-turbo and ONNX Runtime, on the ONNX file of the same network and precision (of FP32 for bar
3). Served is the format that serves fastest on a CPU, which is OpenVINO's, and JPEG tiles are decoded by `slides.native`: `1s` is bar
1 against a loop that decodes so too, and tells what the server itself costs."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from slides.native import DECODERS


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
        limit_formats: of the repository whose network LIMIT runs.
        concurrency: requests in flight, of which every number is measured.
        limit_decoder: what LIMIT decodes JPEG tiles with.
        slides: whole slides are asked of slide_classifier (`perf slides`), not tiles (`perf bench`).
        bars: what it has to reach.
    """

    bar: str
    name: str
    title: str
    architecture: str
    formats: tuple[str, ...]
    limit_formats: tuple[str, ...]
    classifier: str = "tile_classifier"
    concurrency: tuple[int, ...] = (8,)
    limit_decoder: str = DECODERS[0]
    slides: bool = False
    bars: tuple[Bar, ...] = field(default_factory=tuple)


_RESNET18 = Work(
    bar="1",
    name="resnet18",
    title="ResNet-18, FP32, eight requests in flight",
    architecture="resnet18",
    formats=("openvino",),
    limit_formats=("onnx",),
    bars=(
        Bar("ratio_to_limit", ">=", 0.96),
        Bar("p95_to_mean", "<=", 1.25),
        Bar("cpu_ratio", "<=", 1.05),
    ),
)

STANDARD_WORK = (
    _RESNET18,
    replace(
        _RESNET18,
        bar="1s",
        name="resnet18-same-decoder",
        title="The same, against a bare loop that decodes as the server does",
        limit_decoder=DECODERS[1],
        bars=(),
    ),
    Work(
        bar="2",
        name="resnet18-alone",
        title="ResNet-18, FP32, one request at a time, against the soonest answer in-process",
        architecture="resnet18",
        formats=("openvino",),
        limit_formats=("onnx",),
        concurrency=(1,),
        bars=(Bar("latency_to_limit", "<=", 1.15),),
    ),
    Work(
        bar="1b",
        name="mobilenet-int8",
        title="MobileNetV3-Small, INT8, eight requests in flight",
        architecture="mobilenet_v3_small",
        formats=("openvino-int8",),
        limit_formats=("onnx-int8",),
        bars=(Bar("ratio_to_limit", ">=", 0.75),),
    ),
    Work(
        bar="3",
        name="resnet18-int8",
        title="ResNet-18, INT8, 16 requests in flight, against the limit of FP32",
        architecture="resnet18",
        formats=("openvino-int8",),
        limit_formats=("onnx",),
        concurrency=(
            16,
        ),  # with eight, a thirtieth of the processors' time is spent waiting for the next one
        bars=(Bar("ratio_to_limit", ">=", 3.0),),
    ),
    Work(
        bar="4",
        name="slides",
        title="slide_classifier over ResNet-18, FP32, 16 tiles a slide, 8 and 64 slides in flight",
        architecture="resnet18",
        formats=("openvino",),
        limit_formats=("onnx",),
        classifier="slide_classifier",
        concurrency=(8, 64),
        slides=True,
        bars=(Bar("ratio_to_limit", ">=", 0.95),),
    ),
)
