"""python -m training evaluate CHECKPOINT... --data DIR --out DIR
python -m training evaluate CHECKPOINT... --store STORE --out DIR

Ask checkpoints about slides and write report.html (everything in it, no network needed), PNGs, scores.json and
predictions.csv. By default only patients that a checkpoint held out are asked about. Checkpoints of one
cross-validation are pooled: each answers the slides that it held out. Others are compared on the slides that all
of them answer, and joined by their mean, or by the ensemble that `python -m training ensemble` saved.

A slide that cannot be used is listed with its reason and the others go on. Patients that a checkpoint was trained on
are named in the report, in scores.json and in the last line of stdout, which is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import EvaluationError, OutputExistsError

if TYPE_CHECKING:
    from training.evaluation.results import Result

SCORES_NAME = "scores.json"
PREDICTIONS_NAME = "predictions.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate`."""
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="directory that training wrote"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with train.csv and train/ (slides, or ready-cut tiles)",
    )
    parser.add_argument(
        "--store",
        type=Path,
        metavar="STORE",
        help="tile store to read in place of slides; --data is optional then",
    )
    parser.add_argument(
        "--ensemble",
        type=Path,
        metavar="JSON",
        help="ensemble.json; its members are the models in their order",
    )
    parser.add_argument(
        "--split", choices=("held-out", "all"), default="held-out",
        help="held-out: patients that a checkpoint held out; all: every slide (for data from elsewhere) "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--bootstrap", type=_count, default=1000, metavar="N",
        help="resamples of the patients for intervals; 0 for none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--heatmaps", type=_count, default=8, metavar="N", help="slides with a heatmap (default: %(default)s)"
    )
    parser.add_argument(
        "--errors",
        type=_count,
        default=8,
        metavar="N",
        help="worst errors that are shown (default: %(default)s)",
    )
    parser.add_argument(
        "--slide-um-per-px",
        type=float,
        metavar="UM",
        help="resolution of slides that do not state one, um/px",
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1, ... (default: cuda where there is one)",
    )
    parser.add_argument(
        "--batch-size",
        type=_batch,
        metavar="N",
        help="tiles at once (default: what fits into a quarter of free memory)",
    )
    parser.add_argument(
        "--strict", action="store_true",
        help="exit with 1 where a slide was bad or an evaluated patient was trained on; everything is written all the same",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an evaluation that is in OUT already"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate by the command line's options; returns what its last line holds.

    Raises:
        TrainingError, SlidesError, OSError: see `training.errors`; OUT is then as it was.
    """
    started_s = time.monotonic()
    refuse_existing(options.out, overwrite=options.overwrite)
    # Loaded here, so that `--help` and a wrong option answer without waiting for torch.
    from training import checkpoint
    from training.evaluation import candidates, report, results, summary
    from training.evaluation.assignment import assign
    from training.evaluation.data import open_data
    from training.evaluation.prediction import predict

    device = _device(options.device)
    chosen = candidates.read_candidates(options.checkpoints)
    models = candidates.models_of(chosen)
    class_names = chosen[0].spec.class_names
    data = open_data(options.data, options.store, [one.spec for one in chosen], options.slide_um_per_px)
    assignment = assign(models, data.records, options.split)
    predictions = predict(
        models, assignment.without(data.bad), data.source, device=device, batch_tiles=options.batch_size
    )
    if not any(predictions.of_model.values()):
        bad = {**data.bad, **predictions.bad}
        lines = [f"{image_id}: {reason}" for image_id, reason in sorted(bad.items())]
        raise EvaluationError("not one slide can be used", lines)
    told = results.results_of(models, predictions, class_names, options.ensemble)
    scores = summary.summarise(
        models, told, assignment, predictions, data, split=options.split, replicates=options.bootstrap
    )
    with checkpoint.replacing(options.out) as staged:
        shown = told[-1]
        pictures = report.draw(
            staged, told, scores, data.source, heatmaps=options.heatmaps, errors=options.errors
        )
        scores["wall_s"] = round(time.monotonic() - started_s, 1)
        (staged / "report.html").write_text(report.render(scores, pictures, shown), encoding="utf-8")
        text = json.dumps(scores, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (staged / SCORES_NAME).write_text(text, encoding="utf-8")
        (staged / PREDICTIONS_NAME).write_text(
            report.predictions_table(told, assignment, class_names), encoding="utf-8", newline=""
        )
    return {**_last_line(options.out, scores, told), **_exit_code(options, scores)}


def refuse_existing(out_dir: Path, *, overwrite: bool) -> None:
    """Only an evaluation is ever replaced, and only when asked.

    Raises:
        OutputExistsError: `out_dir` holds an evaluation and `overwrite` is False, or something else.
    """
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    if not (out_dir / SCORES_NAME).is_file() or not (out_dir / "report.html").is_file():
        raise OutputExistsError(f"{out_dir} holds something other than an evaluation; give another folder")
    if not overwrite:
        raise OutputExistsError(
            f"{out_dir} holds an evaluation already; give another folder, or --overwrite to replace it"
        )


def _last_line(out_dir: Path, scores: dict[str, Any], told: Sequence[Result]) -> dict[str, Any]:
    of_name = {one["name"]: one for one in scores["models"]}

    def values(name: str) -> dict[str, dict[str, float | None]]:
        return {
            level: {
                score: None if entry["value"] is None else round(entry["value"], 4)
                for score, entry in of_name[name]["levels"][level]["scores"].items()
            }
            for level in ("slide", "patient")
        }

    shown = scores["shown"]
    line: dict[str, Any] = {
        "report": str(out_dir / "report.html"),
        "model": shown,
        "split": scores["split"],
        "slides": scores["data"]["slides"],
        "patients": scores["data"]["patients"],
        "bad_slides": len(scores["data"]["bad_slides"]),
        "exposed_patients": len(scores["exposed_patients"]),
        **values(shown),
    }
    if len(told) > 1:
        line["models"] = {one.name: values(one.name)["patient"] for one in told}
    return {**line, "warnings": [entry["text"] for entry in scores["warnings"]], "wall_s": scores["wall_s"]}


def _exit_code(options: argparse.Namespace, scores: dict[str, Any]) -> dict[str, int]:
    failed = options.strict and (scores["data"]["bad_slides"] or scores["exposed_patients"])
    return {"exit_code": 1} if failed else {}


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that is unknown or not there
        raise EvaluationError(f"--device {name}", [str(error).splitlines()[0]]) from error
    return device


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _batch(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
