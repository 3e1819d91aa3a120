"""The report: one HTML file with everything in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from demo.charts import dot_strip, line_chart
from demo.outcome import Outcome
from demo.parity import MAX_ABS_DIFF
from demo.scores import Scored

TEMPLATE = "report.html.j2"
SHOWN_HEATMAPS = 6
HEATMAP_WIDTH_PX = 760
SHOWN_IMAGES = 60


def render(outcome: Outcome) -> str:
    """The report as self-contained HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"fixed": _fixed, "small": _small, "percent": _percent, "bytes": _bytes}
    class_names = list(outcome.manifest["spec"]["class_names"])
    return environment.get_template(TEMPLATE).render(
        outcome=outcome,
        summary=outcome.summary(),
        spec=outcome.manifest["spec"],
        class_names=class_names,
        tolerance=MAX_ABS_DIFF,
        history_charts=history_charts(outcome.history),
        patient_chart=_patient_chart(outcome.held_out_patients, class_names),
        heatmaps=[
            (image, _inline_jpeg(outcome.heatmaps[image.name]))
            for image in chosen(outcome.images, outcome.heatmaps, SHOWN_HEATMAPS)
        ],
        shown_images=SHOWN_IMAGES,
    )


def chosen(images: Sequence[Scored], heatmaps: Mapping[str, Path], count: int) -> list[Scored]:
    """At most `count` images that have a heatmap: mistakes first (half of them at most), then the classes in
    turn."""
    having = [image for image in images if image.name in heatmaps]
    picked = [image for image in having if not image.right][: max(1, count // 2)]
    rest: dict[str, list[Scored]] = {}
    for image in having:
        if image.right:
            rest.setdefault(image.truth, []).append(image)
    while len(picked) < count and any(rest.values()):
        for of_class in rest.values():
            if of_class and len(picked) < count:
                picked.append(of_class.pop(0))
    return picked


def history_charts(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Charts of what training wrote for each epoch: losses in one, scores between 0 and 1 in another."""
    series: dict[str, list[float]] = {}
    for name in history[0] if history else ():
        values = [epoch.get(name) for epoch in history]
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            series[name] = [float(value) for value in values if value is not None]
    losses = {name.replace("_", " "): line for name, line in series.items() if "loss" in name}
    scores = {
        name.replace("_", " "): line
        for name, line in series.items()
        if ("auc" in name or "accuracy" in name) and "loss" not in name
    }
    charts = []
    if losses:
        charts.append(line_chart(losses, title="Loss"))
    if scores:
        charts.append(line_chart(scores, title="Scores on held-out data"))
    return charts


def _patient_chart(patients: Sequence[Scored], class_names: list[str]) -> str:
    if not patients or len(class_names) != 2:
        return ""
    name = class_names[1]
    points = [(patient.name, patient.truth, patient.probabilities[name]) for patient in patients]
    return dot_strip(points, axis=f"served p({name}), one mark a held-out patient", groups=class_names)


def _inline_jpeg(path: Path) -> str:
    with Image.open(path) as image:
        shown = image.convert("RGB")
    if shown.width > HEATMAP_WIDTH_PX:
        height_px = round(shown.height * HEATMAP_WIDTH_PX / shown.width)
        shown = shown.resize((HEATMAP_WIDTH_PX, height_px), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    shown.save(data, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def _fixed(value: float | None, digits: int = 3) -> str:
    return "\u2013" if value is None else f"{value:.{digits}f}"


def _small(value: float | None) -> str:
    """A number that may be tiny, in powers of ten."""
    if value is None:
        return "\u2013"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    superscript = str(int(exponent)).translate(
        str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
    )
    return f"{mantissa}\u2009\u00d7\u200910{superscript}"


def _percent(value: float | None) -> str:
    return "\u2013" if value is None else f"{100 * value:.1f}\u2009%"


def _bytes(value: float) -> str:
    return f"{value / 1e6:.1f} MB"
