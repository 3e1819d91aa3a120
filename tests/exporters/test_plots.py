"""The picture of speed against accuracy: what is drawn, and that its labels can be read."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Annotation, Text
from PIL import Image

from exporters.plots import MARKERS, speed_accuracy, speed_accuracy_figure


def entry(
    precision: str = "fp32",
    status: str = "accepted",
    *,
    rate: float | None = 300.0,
    beaten: float | None = None,
    max_abs_diff: float | None = 1e-7,
    auc: tuple[float, float] | None = (0.98, 0.98),
    megabytes: float = 44.7,
    reasons: tuple[str, ...] = (),
) -> dict[str, Any]:
    """An entry of release.json's "formats"."""
    speed = {
        "batch": 8,
        "images_per_s": rate,
        "fp32_images_per_s": beaten,
        "machine": "a CPU, 2 cores",
        "ratio": None,
    }
    parity = {"max_abs_diff": max_abs_diff, "patient_auc": list(auc) if auc else None}
    return {
        "precision": precision,
        "status": status,
        "reasons": list(reasons),
        "bytes": int(megabytes * 1e6),
        "parity": {"in_process": parity if max_abs_diff is not None else None, "served": None},
        "speed": speed if rate is not None else None,
    }


EIGHT = {
    "onnx": entry(rate=297),
    "torchscript": entry(rate=262),
    "openvino": entry(rate=345),
    "torch-aoti": entry(status="unproven", rate=301, reasons=("built for one CPU",)),
    "onnx-int8": entry("int8", rate=928, beaten=297, max_abs_diff=3e-4, auc=(0.98, 0.979), megabytes=11.3),
    "openvino-bf16": entry("bf16", rate=514, beaten=345, max_abs_diff=6e-4, megabytes=22.5),
    "openvino-int8": entry(
        "int8",
        "refused",
        rate=1122,
        beaten=345,
        max_abs_diff=0.2,
        auc=(0.98, 0.96),
        megabytes=11.7,
        reasons=("patients' AUC falls by 0.02",),
    ),
    "onnx-fp16": entry("fp16", "unproven", rate=180, beaten=297, max_abs_diff=2e-4, megabytes=22.4),
}


def labels(formats: dict[str, Any]) -> tuple[Any, list[Annotation]]:
    """The figure, drawn, and the labels at its markers."""
    figure = speed_accuracy_figure(formats, title="a title")
    figure.canvas.draw()
    return figure, [
        child
        for child in figure.axes[0].get_children()
        if isinstance(child, Annotation) and " MB" in child.get_text()
    ]


def assert_readable(formats: dict[str, Any]) -> None:
    figure, found = labels(formats)
    renderer = figure.canvas.get_renderer()
    inside = figure.axes[0].get_window_extent(renderer)
    boxes = [Text.get_window_extent(label, renderer) for label in found]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert inside.x0 <= box.x0
        assert box.x1 <= inside.x1
        assert inside.y0 <= box.y0
        assert box.y1 <= inside.y1


def test_two_and_eight_formats_can_be_read() -> None:
    assert_readable({name: EIGHT[name] for name in ("onnx", "onnx-int8")})
    assert_readable(EIGHT)


def test_formats_that_are_alike_can_be_read() -> None:
    assert_readable({f"format-{number}": entry(rate=300.0 + number) for number in range(8)})


@pytest.mark.parametrize("seed", range(3))
def test_twelve_formats_anywhere_can_be_read(seed: int) -> None:
    rng = np.random.default_rng(seed)
    formats = {
        f"openvino-{number}": entry(
            str(rng.choice(list(MARKERS))),
            rate=float(rng.uniform(100, 900)),
            auc=(0.98, float(rng.uniform(0.95, 0.99))),
        )
        for number in range(12)
    }
    assert_readable(formats)


def test_upwards_is_the_auc_where_it_differs_and_closeness_otherwise() -> None:
    figure, _ = labels(EIGHT)
    assert "AUC" in figure.axes[0].get_ylabel()
    low, high = figure.axes[0].get_ylim()
    assert low < -0.02 < 0 < high
    same = {name: {**value, "parity": entry(auc=(1.0, 1.0))["parity"]} for name, value in EIGHT.items()}
    figure, _ = labels(same)
    assert "change of a probability" in figure.axes[0].get_ylabel()
    worst, best = figure.axes[0].get_ylim()
    assert worst > best  # upwards is closer
    assert any("AUC is the same" in text.get_text() for text in figure.texts)


def test_refused_is_crossed_out_with_its_reason_and_unproven_is_hollow() -> None:
    figure, _ = labels(EIGHT)
    scattered = figure.axes[0].collections
    assert sum(len(marker.get_facecolor()) == 0 for marker in scattered) == 2  # the two unproven ones
    black = [
        marker
        for marker in scattered
        if len(marker.get_facecolor()) and not marker.get_facecolor()[0][:3].any()
    ]
    (cross,) = black
    assert cross.get_offsets()[0][0] == 1122
    assert "openvino-int8 is refused: patients' AUC falls by 0.02" in figure.texts[-1].get_text()


def test_fp32_without_a_time_of_its_own_takes_the_one_it_was_compared_with() -> None:
    _, found = labels({"onnx": entry(rate=None), "onnx-int8": entry("int8", rate=900, beaten=310)})
    assert sorted(label.get_text().partition(",")[0] for label in found) == [
        "onnx\n310/s",
        "onnx-int8\n900/s",
    ]


def test_what_was_not_timed_stands_in_a_strip_of_its_own() -> None:
    refused = entry(
        "int8", "refused", rate=None, max_abs_diff=0.3, auc=(0.98, 0.9), reasons=("onnx-int8: bad",)
    )
    formats = {"onnx": entry(), "openvino": entry(rate=2500), "onnx-int8": refused}
    assert_readable(formats)
    figure, found = labels(formats)
    places = {label.get_text().partition("\n")[0]: label.xy[0] for label in found}
    assert places["onnx-int8"] > places["openvino"] > places["onnx"]
    assert any("not timed" in child.get_text() for child in figure.axes[0].texts)
    assert max(figure.axes[0].get_xticks()) < figure.axes[0].get_xlim()[1] * 0.9
    assert "onnx-int8 is refused: bad" in figure.texts[-1].get_text()
    assert_readable({"onnx": entry(rate=None), "torchscript": entry(rate=None)})


def test_what_did_not_run_is_named_and_not_drawn() -> None:
    formats = {
        "onnx": entry(),
        "tensorrt": entry(status="unproven", rate=None, max_abs_diff=None, reasons=("no GPU",)),
    }
    figure, found = labels(formats)
    assert len(found) == 1
    assert "tensorrt is unproven, did not run" in figure.texts[-1].get_text()
    nothing = speed_accuracy({"onnx": entry(rate=None, max_abs_diff=None)}, title="nothing")
    assert Image.open(io.BytesIO(nothing)).format == "PNG"


def test_a_wide_range_of_speeds_is_logarithmic() -> None:
    near = speed_accuracy_figure({"a": entry(rate=100), "b": entry(rate=300)}, title="")
    far = speed_accuracy_figure({"a": entry(rate=100), "b": entry(rate=3000)}, title="")
    assert [figure.axes[0].get_xscale() for figure in (near, far)] == ["linear", "log"]


def test_the_same_formats_give_the_same_bytes() -> None:
    assert speed_accuracy(EIGHT, title="x") == speed_accuracy(EIGHT, title="x")


def test_no_formats_are_an_error() -> None:
    with pytest.raises(ValueError, match="no formats"):
        speed_accuracy({}, title="x")


def test_equal_answers_have_a_place_on_the_logarithmic_axis() -> None:
    figure, _ = labels({"onnx": entry(max_abs_diff=0.0), "torchscript": entry(rate=200, max_abs_diff=0.0)})
    assert all(math.isfinite(limit) for limit in figure.axes[0].get_ylim())
