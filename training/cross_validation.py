"""python -m training cross-validate --recipe demo --data DIR --out runs/cv

Train every fold of a recipe by `accelerate launch training/train.py`, one after the other, and score the predictions of
all held-out folds together. OUT gets folds.json, fold_<k>/ (what training writes), oof.csv (every slide's
probabilities from the network that never saw its patient), scores.json, and snapshots/<n>/held_out.csv where the
schedule is cyclic; `python -m training ensemble` reads oof.csv and the snapshots.

The same command again goes on: finished folds are kept, an interrupted one continues from its saved state. The last line
of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slides.labels import SlideRecord, read_labels
from training import bootstrap, recipe, tracking
from training.atomic_file import write_text
from training.ensembles.tables import Members, read_members
from training.errors import CrossValidationError, FoldsError, OutputExistsError, TableError
from training.folds import Folds, make_folds
from training.recipe import Recipe
from training.scores import all_scores, roc_auc
from training.text_table import aligned

TRAIN = Path(__file__).resolve().parent / "train.py"
GRACE_S = 60.0
"""What a fold's training is given to save its state when this command is interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    known = ", ".join(recipe.names())
    parser.add_argument("--recipe", required=True, help=f"a name ({known}) or the path of a TOML file")
    parser.add_argument(
        "--data", required=True, type=Path, help="folder with train.csv and train/, or a tile store"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for folds, checkpoints, scores")
    parser.add_argument(
        "--folds",
        type=Path,
        metavar="JSON",
        help="folds file (default: the recipe's folds and seed, by patient)",
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="processes a training (default: accelerate's own)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="as of training/train.py; may be repeated",
    )
    parser.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="replicates of intervals (1000)"
    )
    tracking.add_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train what is not trained yet, join, score.

    Raises:
        TrainingError, SlidesError: bad recipe, data or folds; OUT is of another cross-validation, or another process
            works in it (OutputExistsError); a fold's training failed (CrossValidationError).
    """
    started_s = time.monotonic()
    tracking.read_options(options)
    plan = _plan(options)
    records, unusable = _records(plan, options.data)
    folds = Folds.load(options.folds) if options.folds else None
    if folds is None:
        folds = make_folds(records, folds=plan.folds, seed=plan.seed)
    folds.check(records, unusable=unusable)
    with _alone_in(options.out):
        _claim(options.out, plan, folds, options.data)
        for fold in range(folds.folds):
            directory = options.out / f"fold_{fold}"
            if _is_finished(directory):
                print(f"fold {fold}: finished already, kept", file=sys.stderr)
                continue
            print(f"fold {fold} of {folds.folds}: training in {directory}", file=sys.stderr)
            _train(_command(options, fold, directory), directory)
        report = _join(options.out, plan, folds, records, unusable, options.bootstrap)
    write_text(options.out / "scores.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    print(_table(report))
    return {**report, "wall_s": round(time.monotonic() - started_s, 1)}


def _plan(options: argparse.Namespace) -> Recipe:
    values = recipe.load(options.recipe).as_dict()
    for told in options.set:
        if told.partition("=")[0].strip() in ("folds", "held_out_fold"):
            raise FoldsError(
                f"--set {told}", ["folds come from --folds, or from the recipe; all are held out in turn"]
            )
        recipe.set_value(values, told)
    return recipe.from_dict(values, source=str(options.recipe))


def _records(plan: Recipe, data: Path) -> tuple[Sequence[SlideRecord], Sequence[str]]:
    """Usable slides, and image_ids of those that could not be cut."""
    if plan.source == "store":
        from training.store.reader import TileStore  # pyarrow is not needed where there is no store

        store = TileStore.open(data)
        return store.slides, [image_id for image_id, _ in store.failed]
    return read_labels(data, class_names=plan.spec.class_names), ()


@contextlib.contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """A lock that the trainings inherit: it is held while one of them lives, even if this process was killed."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputExistsError(
                f"another cross-validation works in {out}; wait for it, or stop it"
            ) from None
        os.set_inheritable(lock.fileno(), True)
        yield


def _claim(out: Path, plan: Recipe, folds: Folds, data: Path) -> None:
    """Note what OUT is for; refuse one that is for something else."""
    about = {
        "recipe": {
            key: value for key, value in plan.as_dict().items() if key not in ("save_every_s", "workers")
        },
        "folds": folds.fingerprint,
        "data": str(data.resolve()),
    }
    path = out / "cross_validation.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise OutputExistsError(f"{path} is damaged ({error}); give another --out") from error
    if found is None and any(out.glob("fold_*")):
        raise OutputExistsError(f"{out} holds fold_* of something else; give another --out")
    if found is not None and found != json.loads(json.dumps(about)):
        keys = [
            key
            for key in about
            if not isinstance(found, dict) or found.get(key) != json.loads(json.dumps(about[key]))
        ]
        raise OutputExistsError(
            f"{out} holds a cross-validation with another {', '.join(keys)}; give another --out"
        )
    folds.save(out / "folds.json")
    write_text(path, json.dumps(about, indent=2) + "\n")


def _is_finished(directory: Path) -> bool:
    """Whether training wrote all of its results; history.json is the last of them."""
    names = ("checkpoint/checkpoint.json", "held_out.csv", "history.json")
    return all((directory / name).exists() for name in names)


def _command(options: argparse.Namespace, fold: int, directory: Path) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    if options.processes is not None:
        # Without --multi_gpu, Accelerate starts a single process on a machine without a GPU, whatever the number.
        launch += [
            "--num_processes",
            str(options.processes),
            *(["--multi_gpu"] if options.processes > 1 else []),
        ]
    command = [*launch, str(TRAIN), "--recipe", str(options.recipe), "--data", str(options.data)]
    command += [
        "--out",
        str(directory),
        "--folds",
        str(options.out / "folds.json"),
        "--held-out-fold",
        str(fold),
    ]
    command += [word for told in options.set for word in ("--set", told)]
    for name in ("track", "tracking_uri", "experiment", "register"):
        value = getattr(options, name)
        if value is not None:
            command += [f"--{name.replace('_', '-')}", value]
    if (
        directory / "checkpoint"
    ).exists():  # written, but what follows it was not: train.py goes on from its state
        command.append("--overwrite")
    return command


def _train(command: Sequence[str], directory: Path) -> None:
    """Run one training to its end; interrupted, it is asked to stop, and killed after GRACE_S."""
    with (
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            close_fds=False,  # the lock of OUT goes along
            start_new_session=True,  # so that all of its processes can be reached, and Ctrl-C comes from here alone
        ) as process
    ):
        try:
            process.communicate()
        except BaseException:
            _stop(process)
            raise
    if process.returncode:
        raise CrossValidationError(
            f"training in {directory} failed with exit code {process.returncode} (its message is above); folds that "
            "are finished are kept, the same command goes on"
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number, patience_s in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, GRACE_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
            return


def _join(
    out: Path,
    plan: Recipe,
    folds: Folds,
    records: Sequence[SlideRecord],
    unusable: Sequence[str],
    replicates: int,
) -> dict[str, Any]:
    """Write oof.csv and the snapshots' tables; score."""
    directories = [out / f"fold_{fold}" for fold in range(folds.folds)]
    write_text(out / "oof.csv", _concatenated([directory / "held_out.csv" for directory in directories]))
    numbers = [
        {path.name for path in (directory / "snapshots").glob("*") if (path / "held_out.csv").exists()}
        for directory in directories
    ]
    for number in sorted(set.intersection(*numbers)):
        tables = [directory / "snapshots" / number / "held_out.csv" for directory in directories]
        write_text(out / "snapshots" / number / "held_out.csv", _concatenated(tables))
    members = read_members(
        [out / "oof.csv"], records, class_names=plan.spec.class_names, subset=bool(unusable)
    )
    return {
        "out": str(out),
        "architecture": plan.architecture,
        "folds": folds.folds,
        "method": folds.method,
        "slides": len(members.records),
        "patients": len(members.patient_ids),
        **_scores(members, folds, replicates, plan.seed),
        "oof": str(out / "oof.csv"),
    }


def _concatenated(tables: Sequence[Path]) -> str:
    """The rows of all tables under one header; all have the same one."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header: list[str] | None = None
    for path in tables:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.reader(stream))
        if not rows or rows[0] != (header or rows[0]):
            raise TableError(
                str(path),
                ["its header differs from that of fold 0; remove the fold's folder to train it anew"],
            )
        if header is None:
            header = rows[0]
            writer.writerow(header)
        writer.writerows(rows[1:])
    return text.getvalue()


def _scores(members: Members, folds: Folds, replicates: int, seed: int) -> dict[str, Any]:
    """By slide and by patient: of all folds together with intervals, and of each fold."""
    fold_of = folds.fold_of_patient
    patients_P = np.array(members.patient_ids)
    levels = {
        "slide": (members.labels_N, members.probabilities_MNK[0], members.patients_N),
        "patient": (members.labels_P, members.by_patient(members.probabilities_MNK)[0], patients_P),
    }
    told: dict[str, Any] = {"intervals": {}, "of_fold": [{"fold": fold} for fold in range(folds.folds)]}
    for level, (labels, answers, patients) in levels.items():
        fold_R = np.array([fold_of[patient_id] for patient_id in patients.tolist()])
        told[level] = _finite(all_scores(labels.tolist(), answers, fold_R))
        told[level]["roc_auc_across_folds"] = _finite({"": roc_auc(labels.tolist(), answers)})[""]
        if replicates:
            limits = bootstrap.intervals(
                labels.tolist(), answers, patients.tolist(), fold_N=fold_R, replicates=replicates, seed=seed
            )
            told["intervals"][level] = {
                name: list(_finite(dict(enumerate(pair))).values()) for name, pair in limits.items()
            }
        for entry in told["of_fold"]:
            inside = fold_R == entry["fold"]
            entry[f"{level}s"] = int(inside.sum())
            entry[level] = _finite(all_scores(labels[inside].tolist(), answers[inside]))
    return told


def _finite(values: dict[Any, float]) -> dict[Any, float | None]:
    return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}


def _table(report: dict[str, Any]) -> str:
    """Scores by patient of each fold and of all, as plain text."""
    shown = ("roc_auc", "pr_auc", "weighted_log_loss", "balanced_accuracy")
    lines = [["fold", "patients", *shown]]
    rows = [(str(entry["fold"]), entry["patients"], entry["patient"]) for entry in report["of_fold"]]
    for name, patients, values in [*rows, ("all", report["patients"], report["patient"])]:
        cells = ["-" if values[score] is None else f"{values[score]:.4f}" for score in shown]
        lines.append([name, str(patients), *cells])
    return aligned(lines)
