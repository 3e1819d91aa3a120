"""accelerate launch training/train.py --recipe demo --data DIR --out runs/x

Train a classifier on slides, ready-cut tiles or a tile store, and write a Checkpoint.

DIR holds train.csv and train/<image_id>.tif, or is a store of `python -m training tile`. OUT gets checkpoint/,
held_out.csv (probabilities of every held-out slide), history.json (one entry an epoch), and snapshots/ where the
schedule is cyclic. The last line of stdout is one JSON document.

The same command again goes on where a killed or interrupted training stopped, from OUT/state/, and ends with the same
weights to the bit. Several processes without a GPU: torchrun --nproc_per_node 2 training/train.py ...
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Started as a file, Python looks for modules in training/ first; they are to be found as training.*, and only so.
    if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    # Threads that wait for work by spinning lose a factor of three as soon as something else wants a core as well.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded

import numpy as np
from torch import nn

from slides.errors import SlidesError
from slides.labels import SlideRecord, read_labels
from training import checkpoint, processes, recipe, resume, tracking, trainer
from training.atomic_file import write_text
from training.errors import OutputExistsError, TrainingError
from training.folds import Folds, split, split_by_patient
from training.provenance import provenance, versions
from training.task import Split, Task, load_task
from training.tracking.run import Tracking

NOT_OF_THE_WEIGHTS = ("save_every_s", "workers")
"""Keys of a recipe that may change while a training is interrupted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, train, report; returns the exit code: 0 done, 2 bad input, 1 other failures, 130 interrupted."""
    options = _parser().parse_args(arguments)
    started_s = time.monotonic()
    try:
        report = run(options)
    except (TrainingError, SlidesError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (ValueError, OutputExistsError, SlidesError)) else 1
    except KeyboardInterrupt:
        saved = resume.has_saved(options.out / "state")
        rest = (
            "the same command goes on from the state that was saved last" if saved else "nothing was written"
        )
        print(f"interrupted; {rest}", file=sys.stderr)
        return 130
    if report is not None:
        report["wall_s"] = round(time.monotonic() - started_s, 1)
        print(json.dumps(report, separators=(",", ":")), flush=True)
    return 0


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Train by a recipe; the main process writes OUT and returns the report, others return None.

    Raises:
        TrainingError, SlidesError: see `training.errors` and `slides.errors`; OUT then holds at most a state to go on
            from.
    """
    tracked = tracking.read_options(options)
    plan, folds = _plan(options)
    checkpoint.refuse_existing(options.out / "checkpoint", overwrite=options.overwrite)
    records, unusable = _records(plan, options.data)
    slides = _split(plan, folds, records, unusable)
    about = {
        "recipe": {key: value for key, value in plan.as_dict().items() if key not in NOT_OF_THE_WEIGHTS},
        "folds": folds.fingerprint if folds else None,
        "versions": versions(),
    }
    goes_on = not options.restart and resume.goes_on(options.out / "state", about)
    with _tracking(tracked, plan, options.out, goes_on) as tracker:
        accelerator = processes.make_accelerator(plan, tracker.trackers)
        accelerator.init_trackers("clotline")
        try:
            task = load_task(plan, options.data, slides)
            tracker.log_data(task.data)
            keeper = resume.StateKeeper(
                options.out / "state",
                {
                    **about,
                    "data": dict(task.data),
                    "processes": accelerator.num_processes,
                    "distributed": str(accelerator.distributed_type.value),
                    "device": accelerator.device.type,
                },
                process=accelerator.process_index,
                processes=accelerator.num_processes,
                save_every_s=plan.save_every_s,
            )
            if options.restart:
                processes.on_main_process(keeper.discard)

            def keep_snapshot(number: int, network: nn.Module, probabilities_NK: np.ndarray) -> None:
                directory = options.out / "snapshots" / str(number)
                _save(directory, plan, task, network, probabilities_NK, {"snapshot": number}, overwrite=True)
                write_text(directory / "held_out.csv", task.held_out_table(probabilities_NK))

            with keeper.training():
                result = trainer.train(plan, task, accelerator, keeper=keeper, on_snapshot=keep_snapshot)
            accelerator.wait_for_everyone()
            if not accelerator.is_main_process:
                return None
        finally:
            accelerator.end_training()
        report = _write_results(options, plan, task, result)
        told = tracker.finish(
            status="FINISHED",
            metrics={name: value for name, value in report.items() if isinstance(value, float)},
            checkpoint=options.out / "checkpoint",
            files=[options.out / "held_out.csv", options.out / "history.json"],
        )
        keeper.discard()
    return {**report, **({"tracking": told} if told else {})}


def _plan(options: argparse.Namespace) -> tuple[recipe.Recipe, Folds | None]:
    """The recipe with what the command line says otherwise."""
    values = recipe.load(options.recipe).as_dict()
    folds = Folds.load(options.folds) if options.folds else None
    if folds is not None:
        values["folds"] = folds.folds
    if options.held_out_fold is not None:
        values["held_out_fold"] = options.held_out_fold
    for told in options.set:
        recipe.set_value(values, told)
    return recipe.from_dict(values, source=str(options.recipe)), folds


def _records(plan: recipe.Recipe, data: Path) -> tuple[Sequence[SlideRecord], Sequence[str]]:
    """Usable slides, and image_ids of those that could not be cut."""
    if plan.source == "store":
        from training.tile_task import open_store

        store = open_store(plan, data)
        return store.slides, [image_id for image_id, _ in store.failed]
    return read_labels(data, class_names=plan.spec.class_names), ()


def _split(
    plan: recipe.Recipe, folds: Folds | None, records: Sequence[SlideRecord], unusable: Sequence[str]
) -> Split:
    """Hold out a fold, then take the patients for early stopping from those that are left."""
    if folds is not None:
        train, held_out = split(records, folds, plan.held_out_fold, unusable=unusable)
    else:
        train, held_out = split_by_patient(
            records, folds=plan.folds, held_out_fold=plan.held_out_fold, seed=plan.seed
        )
    validation: list[SlideRecord] = []
    if plan.validation_share:
        parts = max(2, round(1 / plan.validation_share))
        train, validation = split_by_patient(train, folds=parts, held_out_fold=0, seed=plan.seed)
    return Split(tuple(train), tuple(validation), tuple(held_out))


@contextlib.contextmanager
def _tracking(
    tracked: tracking.TrackingOptions, plan: recipe.Recipe, out: Path, goes_on: bool
) -> Iterator[Tracking]:
    tracker = tracking.start(
        tracked, recipe=plan.as_dict(), run_dir=out, run_name=out.resolve().name, resume=goes_on
    )
    try:
        yield tracker
    except KeyboardInterrupt:
        tracker.finish(status="KILLED")
        raise
    except BaseException:
        tracker.finish(status="FAILED")
        raise


def _write_results(
    options: argparse.Namespace, plan: recipe.Recipe, task: Task, result: trainer.TrainingResult
) -> dict[str, Any]:
    """Checkpoint, tables and history; returns the report."""
    probabilities_NK = result.held_out_probabilities_NK
    about = {"best_epoch": result.best_epoch}
    directory = options.out / "checkpoint"
    metrics = _save(directory, plan, task, result.model, probabilities_NK, about, overwrite=options.overwrite)
    write_text(options.out / "held_out.csv", task.held_out_table(probabilities_NK))
    write_text(options.out / "history.json", json.dumps(result.history, indent=2) + "\n")
    for path in (options.out / "snapshots").glob("*"):
        if not path.name.isdigit() or int(path.name) > plan.cycles:
            shutil.rmtree(path, ignore_errors=True)  # of the training that is replaced
    extra_files = getattr(task, "extra_files", None)
    for name, content in (extra_files(result.model, probabilities_NK) if extra_files else {}).items():
        write_text(options.out / name, content)
    return {
        "checkpoint": str(directory),
        **{name: round(value, 4) for name, value in metrics.items()},
        "slides": task.data["slides"],
        "patients": task.data["patients"],
        "held_out_patients": len(task.data["held_out_patients"]),
        "tiles": task.data["tiles"],
        "epochs": len(result.history),
    }


def _save(
    directory: Path,
    plan: recipe.Recipe,
    task: Task,
    network: nn.Module,
    probabilities_NK: np.ndarray,
    about: dict[str, Any],
    *,
    overwrite: bool,
) -> dict[str, float]:
    """Write a checkpoint with its scores, which are returned; undefined ones are left out."""
    scores = task.scores(task.held_out_set, probabilities_NK)
    metrics = {name: value for name, value in scores.items() if math.isfinite(value)}
    about = {"recipe": plan.as_dict(), **about, **provenance()}
    task.save(directory, network, probabilities_NK, metrics=metrics, about=about, overwrite=overwrite)
    return metrics


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="training/train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    known = ", ".join(recipe.names())
    parser.add_argument("--recipe", required=True, help=f"a name ({known}) or the path of a TOML file")
    parser.add_argument(
        "--data", required=True, type=Path, help="folder with train.csv and train/, or a tile store"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for the checkpoint and the scores")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint that is in OUT already"
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="begin anew where OUT holds the state of an interrupted training",
    )
    parser.add_argument("--folds", type=Path, metavar="FILE", help="folds of `python -m training folds`")
    parser.add_argument("--held-out-fold", type=int, metavar="N", help="the recipe's held_out_fold, from 0")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of the recipe with another value, as in TOML: epochs=3, spec.um_per_px=0.5; may be repeated",
    )
    tracking.add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
