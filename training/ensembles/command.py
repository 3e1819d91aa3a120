"""python -m training ensemble --oof a.csv b.csv --labels train.csv --method soft --out ensemble.json

Join out-of-fold predictions of several networks into one answer, score it on patients that no part of it was fitted
on, and save its definition for the exporter. Only tables are read: each --oof file has image_id and one probability
column a class, named CE or p_CE; train.csv has image_id, center_id, patient_id, image_num, label. A patient's
probability is the mean over its slides.

The last line of stdout is one JSON document: `slide` and `patient` with roc_auc, weighted_log_loss and more, their bootstrap
intervals by patient, and where the definition lies.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slides.labels import SlideRecord
from training.atomic_file import write_text
from training.ensembles import combination, predictions
from training.ensembles.assessment import Assessment, assess, scores_of
from training.ensembles.combination import METHODS, Plan
from training.ensembles.definition import FORMAT, Ensemble, Member
from training.ensembles.tables import Members, read_members, snapshot_tables
from training.ensembles.voting import normalised_weights
from training.errors import EnsembleError, OutputExistsError
from training.folds import Folds
from training.label_table import read_label_table
from training.scores import all_scores, finite_or_none
from training.text_table import aligned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--oof", type=Path, nargs="+", metavar="CSV", help="one table a member")
    source.add_argument(
        "--snapshots",
        type=Path,
        metavar="RUN",
        help="members are RUN/snapshots/<n>/held_out.csv, of one training run or of a cross-validation",
    )
    parser.add_argument("--labels", type=Path, required=True, help="train.csv; its slides need not be there")
    parser.add_argument("--method", choices=METHODS, default="soft", help="default: soft")
    parser.add_argument(
        "--weights",
        nargs="+",
        metavar="W",
        help="one number >= 0 a member, for soft and hard voting (default: equal)",
    )
    parser.add_argument(
        "--checkpoints", nargs="+", metavar="DIR", help="one checkpoint a member, noted for the exporter"
    )
    parser.add_argument(
        "--folds",
        type=Path,
        metavar="JSON",
        help="the folds of the predictions, from `python -m training folds`",
    )
    parser.add_argument(
        "--inner-folds",
        type=int,
        default=5,
        help="without --folds: patients are dealt into so many folds where something is fitted (default: 5)",
    )
    parser.add_argument("--temperature", action="store_true", help="fit a temperature; not for hard voting")
    parser.add_argument(
        "--abstain-alpha",
        type=float,
        metavar="A",
        help="answer only where a conformal set that misses the truth for a share A of patients holds one class",
    )
    parser.add_argument(
        "--class-names",
        nargs="+",
        metavar="NAME",
        help="all classes (default: those that occur in the labels)",
    )
    parser.add_argument(
        "--subset",
        action="store_true",
        help="allow labelled slides that no table has (implied by --snapshots)",
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=1000,
        metavar="N",
        help="replicates of the intervals (default: 1000, 0: none)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of folds and bootstrap (default: 0)")
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="CSV",
        help="write answers and uncertainty of each slide and patient",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("ensemble.json"), help="the definition (default: ensemble.json)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Read, fit, score, save; nothing is written where anything is wrong.

    Raises:
        TrainingError: with every problem of the options, or of all tables, at once.
    """
    _check(options)
    paths = snapshot_tables(options.snapshots) if options.snapshots else options.oof
    weights_M = normalised_weights(_numbers(options.weights), len(paths))
    records = read_label_table(options.labels, class_names=options.class_names)
    class_names = options.class_names or sorted({record.label for record in records})
    if len(class_names) < 2:
        raise EnsembleError(
            str(options.labels), [f"every label is {class_names[0]}; name all classes with --class-names"]
        )
    members = read_members(
        paths,
        records,
        class_names=class_names,
        subset=options.subset or options.snapshots is not None,
    )
    plan = Plan(options.method, weights_M, with_temperature=options.temperature)
    fold_N = _folds(options, plan, members, records)
    assessment = assess(members, plan, fold_N, options.abstain_alpha)
    scores = scores_of(assessment, members, replicates=options.bootstrap, seed=options.seed)
    report = _report(assessment, members, scores)
    ensemble = Ensemble(
        class_names=members.class_names,
        members=tuple(
            Member(name, hashlib.sha256(Path(path).read_bytes()).hexdigest(), checkpoint)
            for name, path, checkpoint in zip(
                members.names, paths, options.checkpoints or [None] * len(paths), strict=True
            )
        ),
        combination=assessment.combination,
        abstention=assessment.abstention,
        fitted_on_patients=tuple(members.patient_ids) if fold_N is not None else (),
        scores={level: finite_or_none(scores[level]) for level in ("slide", "patient")},
    )
    if options.predictions:
        write_text(options.predictions, predictions.as_csv(assessment, members, weights_M))
        report["predictions"] = str(options.predictions)
    ensemble.save(options.out)
    print(_table(members, scores))
    return {**report, "out": str(options.out)}


def _check(options: argparse.Namespace) -> None:
    """Options that contradict each other or would destroy something, all at once."""
    problems = []
    inputs = [path.resolve() for path in (*(options.oof or ()), options.labels, options.folds) if path]
    for name in ("out", "predictions"):
        path = getattr(options, name)
        if path and path.resolve() in inputs:
            problems.append(f"--{name} {path} is one of the files that are read")
    if options.predictions and options.predictions.resolve() == options.out.resolve():
        problems.append("--out and --predictions are the same file")
    if options.weights and options.method == "stack":
        problems.append("--weights is for voting; stacking finds its own")
    if options.temperature and options.method == "hard":
        problems.append("--temperature has no meaning for hard votes; take --method soft")
    if options.abstain_alpha is not None and not 0 < options.abstain_alpha < 1:
        problems.append(f"--abstain-alpha must be above 0 and below 1, not {options.abstain_alpha:g}")
    if options.inner_folds < 2:
        problems.append(f"--inner-folds must be at least 2, not {options.inner_folds}")
    if options.bootstrap < 0:
        problems.append(f"--bootstrap must be 0 or more, not {options.bootstrap}")
    if not 0 <= options.seed < 2**32:
        problems.append(f"--seed must be within 0..{2**32 - 1}, not {options.seed}")
    names = options.class_names
    if names and len(set(names)) < len(names):
        problems.append(f"--class-names has a name twice: {', '.join(names)}")
    if options.checkpoints and options.oof and len(options.checkpoints) != len(options.oof):
        problems.append(
            f"{len(options.checkpoints)} --checkpoints for {len(options.oof)} tables; give one each"
        )
    if problems:
        raise EnsembleError("options", problems)
    if options.out.exists() and not _is_definition(options.out):
        raise OutputExistsError(f"{options.out} exists and is no ensemble of Clotline; give another --out")


def _numbers(words: Sequence[str] | None) -> list[float] | None:
    if words is None:
        return None
    values, problems = [], []
    for word in (part for entry in words for part in entry.split(",") if part):
        try:
            values.append(float(word))
        except ValueError:
            problems.append(f"{word!r} is not a number")
    if problems:
        raise EnsembleError("weights", problems)
    return values


def _folds(
    options: argparse.Namespace, plan: Plan, members: Members, records: Sequence[SlideRecord]
) -> NDArray[np.intp] | None:
    """The fold of each row where something is fitted; a folds file is checked in any case."""
    folds = Folds.load(options.folds) if options.folds else None
    if folds:
        folds.check(records)
    if not plan.learns and options.abstain_alpha is None:
        return None
    if folds:
        fold_of = folds.fold_of_patient
        return np.array([fold_of[patient_id] for patient_id in members.patients_N.tolist()], dtype=np.intp)
    return combination.inner_folds(
        members.labels_N, members.patients_N, folds=options.inner_folds, seed=options.seed
    )


def _report(assessment: Assessment, members: Members, scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    join = assessment.combination
    report: dict[str, Any] = {
        "method": join.method,
        "members": list(members.names),
        "class_names": list(members.class_names),
        "slides": len(members.records),
        "patients": len(members.patient_ids),
        "slide": scores["slide"],
        "patient": scores["patient"],
    }
    if scores["intervals"]:
        report["intervals"] = scores["intervals"]
    if join.meta is None:
        report["weights"] = join.weights_M.tolist()
    else:
        report["meta_learner"] = join.meta.kind
    if assessment.fold_N is not None:
        report["nested_folds"] = int(np.unique(assessment.fold_N).size)
    if join.temperature != 1.0:
        report["temperature"] = join.temperature
    if assessment.abstention:
        report["abstention"] = {
            "alpha": assessment.abstention.alpha,
            "threshold": assessment.abstention.threshold,
            **scores["abstained"],
        }
    return report


def _table(members: Members, scores: dict[str, dict[str, Any]]) -> str:
    """Members and ensemble side by side, by patient, as plain text."""
    shown = ("roc_auc", "pr_auc", "weighted_log_loss", "balanced_accuracy", "expected_calibration_error")
    rows = [["patients of", *(name.replace("expected_calibration_error", "ece") for name in shown)]]
    for name, values_NK in zip(members.names, members.probabilities_MNK, strict=True):
        own = all_scores(members.labels_P.tolist(), members.by_patient(values_NK))
        rows.append([name, *(f"{own[score]:.4f}" for score in shown)])
    rows.append(["ensemble", *(f"{scores['patient'][score]:.4f}" for score in shown)])
    return aligned(rows)


def _is_definition(path: Path) -> bool:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("format") == FORMAT
