"""The report: charts and pictures as PNG files, and one HTML file with all of them in it."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from slides.errors import SlidesError
from training.errors import TrainingError
from training.evaluation import curves, pictures, plots, scoring, summary
from training.evaluation.assignment import Assignment
from training.evaluation.prediction import SlideAnswer
from training.evaluation.results import Result
from training.evaluation.scoring import Rows
from training.evaluation.sources import Source, reason_of

TEMPLATE = "report.html.j2"
PICTURE_WIDTH_PX = 1300
MOST_CURVES = 7
COVERAGES = (1.0, 0.9, 0.8, 0.7, 0.5)
SCORE_TITLES = {
    "roc_auc": ("ROC AUC", "higher is better; 0.5 is a guess"),
    "pr_auc": ("PR AUC", "higher is better; a guess has the share of the class"),
    "weighted_log_loss": ("weighted log loss", "lower is better; ln K is a guess"),
    "accuracy": ("accuracy", "higher is better"),
    "balanced_accuracy": ("balanced accuracy", "higher is better; 1/K is a guess"),
    "brier": ("Brier score", "lower is better"),
    "expected_calibration_error": ("calibration error (ECE)", "lower is better; few cases raise it"),
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of one slide.

    Attributes:
        uri: data: URI for the report, "" where the picture cannot be drawn.
        reason: why it cannot.
    """

    place: int
    uri: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What the report shows: name -> data: URI of a chart; errors and heatmaps of slides."""

    charts: dict[str, str]
    errors: list[Picture]
    heatmaps: list[Picture]


def draw(
    folder: Path,
    results: Sequence[Result],
    scores: Mapping[str, Any],
    source: Source,
    *,
    heatmaps: int,
    errors: int,
) -> Pictures:
    """Write all PNGs into `folder`; the last of `results` is the one that is shown in detail."""
    charts = {}
    caveat = _caveat(scores)
    for name, plain in _charts(results, scores).items():
        data = _stamped(plain, caveat) if caveat else plain
        (folder / f"{name}.png").write_bytes(data)
        charts[name] = _uri(data, "png")
    shown = results[-1]
    wrong = summary.worst_errors(shown, errors)
    others = heatmap_places(shown, set(wrong), heatmaps) if shown.answers[0].places is not None else []
    drawn: dict[str, list[Picture]] = {"errors": [], "heatmaps": []}
    work = [("errors", place) for place in wrong] + [("heatmaps", place) for place in others]
    for number, (kind, place) in enumerate(tqdm(work, desc="pictures", unit="slide", file=sys.stderr)):
        answer = _as_scored(shown, place)
        try:
            make: Callable[..., bytes | None] = pictures.error if kind == "errors" else pictures.heatmap
            drawing = make(answer, _class_names(scores), source)
        except (SlidesError, TrainingError, OSError) as error:
            drawn[kind].append(Picture(place, "", reason_of(error)))
            continue
        if drawing is not None:
            order = f"{number + 1:02d}_" if kind == "errors" else ""
            (folder / kind).mkdir(exist_ok=True)
            (folder / kind / f"{order}{_file_name(answer.record.image_id)}.png").write_bytes(drawing)
            drawn[kind].append(Picture(place, _small_jpeg(drawing)))
    return Pictures(charts, drawn["errors"], drawn["heatmaps"])


def heatmap_places(result: Result, left_out: set[int], count: int) -> list[int]:
    """Slides to look at: classes in turn, of each class evenly from the most to the least certain of the truth."""
    rows = result.slides
    of_truth_N = rows.probabilities_NK[np.arange(len(rows)), rows.labels_N]
    queues = []
    classes = np.unique(rows.labels_N)
    for k in classes:
        places = [int(n) for n in np.flatnonzero(rows.labels_N == k) if int(n) not in left_out]
        places.sort(key=lambda n: -of_truth_N[n])
        take = min(len(places), math.ceil(count / len(classes)))
        queues.append([places[round(step)] for step in np.linspace(0, len(places) - 1, take)] if take else [])
    turns = max(map(len, queues), default=0)
    return [queue[turn] for turn in range(turns) for queue in queues if turn < len(queue)][:count]


def render(scores: Mapping[str, Any], drawn: Pictures, shown: Result) -> str:
    """The report as self-contained HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "fixed": _fixed,
        "percent": _percent,
        "share": _share,
        "sentence": _sentence,
        "confidence": _confidence,
    }
    detail = next(one for one in scores["models"] if one["name"] == scores["shown"])
    spec = shown.answers[0].candidates[0].spec
    return environment.get_template(TEMPLATE).render(
        scores=scores,
        detail=detail,
        class_names=_class_names(scores),
        score_titles=SCORE_TITLES,
        charts=drawn.charts,
        errors=[(_facts(shown, one.place), one) for one in drawn.errors],
        heatmaps=[(_facts(shown, one.place), one) for one in drawn.heatmaps],
        wrong=len(summary.worst_errors(shown, len(shown.slides))),
        slides=[_facts(shown, place) for place in range(len(shown.slides))],
        ready_cut=shown.answers[0].places is None,
        attention=shown.answers[0].tiles.attention_T is not None,
        tile_um=round(spec.tile_size_px * spec.um_per_px),
        coverages=_at_coverages(detail["abstention"]["patient"]),
        counts=_counts(shown),
    )


def predictions_table(results: Sequence[Result], assignment: Assignment, class_names: Sequence[str]) -> str:
    """predictions.csv: one row a slide and result; of a single model it is an out-of-fold table for `ensemble`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ("tiles", "entropy", "disagreement", "exposure", "model", "checkpoint")
    writer.writerow(
        [
            "image_id",
            "patient_id",
            "center_id",
            "label",
            *(f"p_{name}" for name in class_names),
            "predicted",
            *columns,
        ]
    )
    for result in results:
        entropy_N = scoring.entropy(result.slides.probabilities_NK)
        for place, answer in enumerate(result.answers):
            record, values_K = answer.record, result.slides.probabilities_NK[place]
            disagreement = "" if result.disagreement_N is None else f"{result.disagreement_N[place]:.6g}"
            single = len(result.members) == 1
            writer.writerow(
                [
                    *(record.image_id, record.patient_id, record.center_id, record.label),
                    *(f"{value:.9g}" for value in values_K),
                    class_names[int(values_K.argmax())],
                    *(len(answer.tiles.rows_T), f"{entropy_N[place]:.6g}", disagreement),
                    summary.exposure_of(answer, result, assignment),
                    result.name,
                    " ".join(one.name for one in answer.candidates) if single else "",
                ]
            )
    return text.getvalue()


def _charts(results: Sequence[Result], scores: Mapping[str, Any]) -> dict[str, bytes]:
    shown, detail = results[-1], scores["models"][-1]
    class_names = _class_names(scores)
    patients = scoring.patient_rows(shown.slides)
    charts = {}
    roc, precision_recall = _named_curves(results, class_names, patients)
    binary = len(class_names) == 2
    positive = f", positive class {class_names[1]}" if binary else ", one class against the rest"
    if roc:
        charts["roc"] = plots.roc(roc, f"ROC{positive}")
        charts["precision_recall"] = plots.precision_recall(precision_recall, f"Precision-recall{positive}")
    charts["confusion"] = plots.confusion(
        {f"by {level}": detail["confusion"][level] for level in ("patient", "slide")}
    )
    charts["reliability"] = plots.reliability(
        {
            f"{level}s (n = {detail['levels'][level]['n']})": detail["reliability"][level]
            for level in ("patient", "slide")
        },
        "Reliability",
        1 / len(class_names),
    )
    charts["probabilities"] = plots.histogram(patients, class_names, "patients")
    charts["abstention"] = plots.abstention(
        {
            f"{level}s (n = {detail['levels'][level]['n']}){shade}": detail["abstention"][level]
            for level, shade in (("patient", ", band: 95 % interval"), ("slide", ""))
        },
        "Leaving the uncertain to a person",
    )
    groups = [("all centres", detail["levels"]["patient"])]
    groups += [(f"centre {name}", told["patient"]) for name, told in detail["centres"].items()]
    charts["centres"] = plots.forest(
        groups, "roc_auc", "ROC AUC by patient, 95 % bootstrap interval", chance=0.5, limits=(-0.02, 1.02)
    )
    if len(results) > 1:
        models = [(one["name"], one["levels"]["patient"]) for one in scores["models"]]
        charts["models"] = plots.forest(
            models[::-1],
            "roc_auc",
            "ROC AUC by patient, 95 % bootstrap interval",
            chance=0.5,
            limits=(-0.02, 1.02),
        )
    return charts


def _named_curves(
    results: Sequence[Result], class_names: Sequence[str], patients: Rows
) -> tuple[dict[str, curves.Curve], dict[str, curves.Curve]]:
    """The shown result by patient with its band, then its slides (one model) or the other models' patients."""
    sets: list[tuple[str, Rows, int, bool]] = []
    if len(class_names) > 2:
        sets = [(f"{name}, patients", patients, k, False) for k, name in enumerate(class_names)][:MOST_CURVES]
    elif len(results) == 1:
        sets = [("patients", patients, 1, True), ("slides", results[-1].slides, 1, False)]
    else:
        sets = [(f"{results[-1].name}, patients", patients, 1, True)]
        sets += [
            (f"{one.name}, patients", scoring.patient_rows(one.slides), 1, False) for one in results[:-1]
        ]
        sets = sets[:MOST_CURVES]
    roc: dict[str, curves.Curve] = {}
    precision_recall: dict[str, curves.Curve] = {}
    for name, rows, k, band in sets:
        of_roc = curves.roc(rows, k, band=band)
        of_precision_recall = curves.precision_recall(rows, k, band=band)
        if of_roc is None or of_precision_recall is None:
            continue
        numbers = f"{of_roc.positives} {class_names[k]}, {of_roc.negatives} other"
        if len(class_names) == 2:
            numbers = f"{of_roc.positives} {class_names[1]}, {of_roc.negatives} {class_names[0]}"
        one_against_rest = np.stack([1 - rows.probabilities_NK[:, k], rows.probabilities_NK[:, k]], axis=1)
        values = scoring.scores.all_scores((rows.labels_N == k).astype(int), one_against_rest)
        shade = ", band: 95 %" if of_roc.low_G is not None else ""
        roc[f"{name} ({numbers}): AUC {values['roc_auc']:.3f}{shade}"] = of_roc
        precision_recall[f"{name} ({numbers}): AUC {values['pr_auc']:.3f}{shade}"] = of_precision_recall
    return roc, precision_recall


def _caveat(scores: Mapping[str, Any]) -> str:
    count = len(scores["exposed_patients"])
    if not count:
        return ""
    return f"Not a test on new patients: {count} of {scores['data']['patients']} were known to training."


def _stamped(data: bytes, text: str) -> bytes:
    """A chart with a line of warning below it, since charts travel without their report."""
    with Image.open(io.BytesIO(data)) as opened:
        chart = opened.convert("RGB")
    size_px = 22
    font = ImageFont.load_default(size_px)
    while size_px > 12 and font.getlength(text) > chart.width - 40:
        size_px -= 1
        font = ImageFont.load_default(size_px)
    stamped = Image.new("RGB", (chart.width, chart.height + 46), "white")
    stamped.paste(chart, (0, 0))
    ImageDraw.Draw(stamped).text((20, chart.height + 8), text, fill=plots.COLOURS[1], font=font)
    out = io.BytesIO()
    stamped.save(out, format="PNG")
    return out.getvalue()


def _as_scored(result: Result, place: int) -> SlideAnswer:
    """The answer with the probabilities that were scored: an ensemble's, where it is one."""
    return dataclasses.replace(result.answers[place], probabilities_K=result.slides.probabilities_NK[place])


def _facts(result: Result, place: int) -> dict[str, Any]:
    answer, values_K = result.answers[place], result.slides.probabilities_NK[place]
    class_names = answer.candidates[0].spec.class_names
    k = int(values_K.argmax())
    return {
        "image_id": answer.record.image_id,
        "patient_id": answer.record.patient_id,
        "center_id": answer.record.center_id,
        "label": answer.record.label,
        "predicted": class_names[k],
        "confidence": float(values_K[k]),
        "right": class_names[k] == answer.record.label,
        "probabilities": values_K.tolist(),
        "tiles": len(answer.tiles.rows_T),
        "checkpoint": " ".join(one.name for one in answer.candidates),
    }


def _at_coverages(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """For each of COVERAGES the point with the largest coverage that does not exceed it."""
    told: list[Mapping[str, Any]] = []
    for coverage in COVERAGES:
        point = next((one for one in points if one["coverage"] <= coverage + 1e-9), None)
        if point is not None and point not in told:
            told.append(point)
    return told


def _counts(result: Result) -> list[dict[str, Any]]:
    """Slides and patients by centre and class."""
    told = []
    for centre, rows in summary.by_centre(result).items():
        patients = scoring.patient_rows(rows)
        size = rows.probabilities_NK.shape[1]
        told.append(
            {
                "centre": centre,
                "slides": np.bincount(rows.labels_N, minlength=size).tolist(),
                "patients": np.bincount(patients.labels_N, minlength=size).tolist(),
            }
        )
    return told


def _class_names(scores: Mapping[str, Any]) -> list[str]:
    return list(scores["class_names"])


def _file_name(image_id: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", image_id)[:100]


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode("ascii")


def _small_jpeg(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        shown = image.convert("RGB")
    if shown.width > PICTURE_WIDTH_PX:
        height_px = round(shown.height * PICTURE_WIDTH_PX / shown.width)
        shown = shown.resize((PICTURE_WIDTH_PX, height_px), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    shown.save(out, format="JPEG", quality=88)
    return _uri(out.getvalue(), "jpeg")


def _fixed(value: float | None, digits: int = 3) -> str:
    return "\u2013" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None, digits: int = 0) -> str:
    return "\u2013" if value is None else f"{100 * value:.{digits}f}\u2009%"


def _confidence(value: float) -> str:
    """A probability below 1 is never shown as 100 %."""
    return "more than 99.9\u2009%" if 0.999 < value < 1 else _percent(value, 1 if value > 0.995 else 0)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _share(told: Mapping[str, Any]) -> str:
    """ "8 of 10 (80 %, 49 to 94 %)"; of nothing, "none"."""
    if told["value"] is None:
        return "none"
    low, high = round(100 * told["low"]), round(100 * told["high"])
    return f"{told['part']} of {told['whole']} ({_percent(told['value'])}; {low} to {high}\u2009%)"
