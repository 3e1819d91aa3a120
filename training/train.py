"""accelerate launch training/train.py --recipe demo --data DIR --out runs/x

Train a classifier of tiles on slides (or ready-cut tiles) and write a Checkpoint.

DIR holds train.csv and train/<image_id>.tif. OUT gets checkpoint/, held_out.csv (probabilities of every held-out
slide) and history.json (one entry an epoch). The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Started as a file, Python looks for modules in training/ first; they are to be found as training.*, and only so.
    if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    # Threads that wait for work by spinning lose a factor of three as soon as something else wants a core as well.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from slides.errors import SlidesError
from slides.labels import SlideRecord, read_labels
from training import checkpoint, recipe, scores, tiles, trainer
from training.errors import OutputExistsError, TrainingError
from training.split import split_by_patient

GOLDEN_TILES = 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, train, report; returns the exit code."""
    options = _parser().parse_args(arguments)
    started_s = time.monotonic()
    try:
        report = run(options.recipe, options.data, options.out, overwrite=options.overwrite)
    except (TrainingError, SlidesError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (ValueError, OutputExistsError, SlidesError)) else 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    if report is not None:
        report["wall_s"] = round(time.monotonic() - started_s, 1)
        print(json.dumps(report, separators=(",", ":")), flush=True)
    return 0


def run(recipe_name: str, data_dir: Path, out_dir: Path, *, overwrite: bool = False) -> dict[str, Any] | None:
    """Train by a recipe; the main process writes `out_dir` and returns the report, others return None.

    Raises:
        TrainingError, SlidesError: see `training.errors` and `slides.errors`; `out_dir` is then as it was.
    """
    plan = recipe.load(recipe_name)
    checkpoint.refuse_existing(out_dir / "checkpoint", overwrite=overwrite)
    records = read_labels(data_dir, class_names=plan.spec.class_names)
    train_records, held_out_records = split_by_patient(
        records, folds=plan.folds, held_out_fold=plan.held_out_fold, seed=plan.seed
    )
    accelerator = trainer.make_accelerator(plan)
    try:
        slides = _on_main_process(
            accelerator, lambda: tiles.collect_tiles(train_records + held_out_records, plan.source, plan.spec)
        )
        train_slides, held_out_slides = slides[: len(train_records)], slides[len(train_records) :]
        train_set = tiles.TileDataset(
            train_slides, plan.spec, colour_jitter=plan.colour_jitter, seed=plan.seed
        )
        held_out_set = tiles.TileDataset(held_out_slides, plan.spec)
        result = trainer.train(plan, train_set, held_out_set, accelerator)
        if not accelerator.is_main_process:
            return None
    finally:
        accelerator.end_training()
    metrics = scores.score(
        result.held_out_probabilities_NK, held_out_set.slide_of_tile, held_out_records, plan.spec.class_names
    )
    metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
    held_out_patients = sorted({record.patient_id for record in held_out_records})
    data = {
        "fingerprint": tiles.fingerprint(slides),
        "slides": len(slides),
        "tiles": len(train_set) + len(held_out_set),
        "patients": len({record.patient_id for record in records}),
        "held_out_slides": [record.image_id for record in held_out_records],
        "held_out_patients": held_out_patients,
    }
    checkpoint.save(
        out_dir / "checkpoint",
        result.model,
        plan.spec,
        architecture=plan.architecture,
        metrics=metrics,
        data=data,
        golden_tiles=_golden_tiles(held_out_set, result.held_out_probabilities_NK),
        about={"recipe": plan.as_dict(), **_provenance()},
        overwrite=overwrite,
    )
    of_slide = scores.by_slide(result.held_out_probabilities_NK, held_out_set.slide_of_tile)
    _write(out_dir / "held_out.csv", _held_out_table(held_out_records, of_slide, plan.spec.class_names))
    _write(out_dir / "history.json", json.dumps(result.history, indent=2) + "\n")
    return {
        "checkpoint": str(out_dir / "checkpoint"),
        **{name: round(value, 4) for name, value in metrics.items()},
        "slides": data["slides"],
        "patients": data["patients"],
        "held_out_patients": len(held_out_patients),
        "tiles": data["tiles"],
    }


def _on_main_process(
    accelerator: Accelerator, collect: Callable[[], list[tiles.SlideTiles]]
) -> list[tiles.SlideTiles]:
    """What `collect` returns or raises on the main process, on every process."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome[0] = collect()
        except (TrainingError, SlidesError) as error:
            outcome[0] = error
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _golden_tiles(held_out: tiles.TileDataset, probabilities_NK: np.ndarray) -> list[checkpoint.GoldenTile]:
    """Up to GOLDEN_TILES held-out tiles: classes take turns, and each class's are spread over its slides."""
    rows_of: dict[int, list[int]] = {}
    for row, label in enumerate(held_out.labels):
        rows_of.setdefault(label, []).append(row)
    each = math.ceil(GOLDEN_TILES / len(rows_of))
    spread = [
        [rows[round(place)] for place in np.linspace(0, len(rows) - 1, min(each, len(rows)))]
        for _, rows in sorted(rows_of.items())
    ]
    chosen = [rows[turn] for turn in range(each) for rows in spread if turn < len(rows)][:GOLDEN_TILES]
    return [
        checkpoint.GoldenTile(
            image_id=held_out.slide_of_tile[row],
            label=held_out.spec.class_names[held_out.labels[row]],
            data=held_out.tiles[row],
            probabilities=tuple(probabilities_NK[row].tolist()),
        )
        for row in chosen
    ]


def _held_out_table(
    records: Sequence[SlideRecord], of_slide: dict[str, Any], class_names: Sequence[str]
) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image_id", "patient_id", "center_id", "label", *(f"p_{name}" for name in class_names)])
    for record in records:
        values = [f"{value:.9g}" for value in of_slide[record.image_id]]
        writer.writerow([record.image_id, record.patient_id, record.center_id, record.label, *values])
    return text.getvalue()


def _provenance() -> dict[str, Any]:
    packages = ("torch", "torchvision", "accelerate", "safetensors", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "created_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "versions": {"python": platform.python_version(), **versions},
    }


def _git_commit() -> str:
    """The commit of this code, "-dirty" added where files differ from it; "unknown" outside a git checkout."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    command = [
        git,
        "-C",
        str(Path(__file__).resolve().parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.stdout.strip()


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="training/train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(recipe.names())
    parser.add_argument("--recipe", required=True, help=f"a name ({known}) or the path of a TOML file")
    parser.add_argument("--data", required=True, type=Path, help="folder with train.csv and train/")
    parser.add_argument("--out", required=True, type=Path, help="folder for the checkpoint and the scores")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint that is in OUT already"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
