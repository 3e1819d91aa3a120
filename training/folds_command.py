"""python -m training folds --data DIR --folds 5 --seed 0 --out folds.json

Deal patients into folds that keep classes even, or (--by centre) into one fold a centre, and save them as a file that
`training/train.py --folds`, `cross-validate` and `ensemble` read. Patients are never divided. Prints patients, slides
and classes of each fold; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from slides.labels import SlideRecord
from training.errors import FoldsError, OutputExistsError
from training.folds import Folds, leave_one_centre_out, make_folds
from training.label_table import read_label_table
from training.text_table import aligned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", type=Path, help="folder with train.csv (its slides need not be there), or a tile store"
    )
    source.add_argument("--labels", type=Path, help="a label file in the layout of train.csv")
    parser.add_argument("--folds", type=int, help="number of folds (default: 5); not with --by centre")
    parser.add_argument("--seed", type=int, help="of the deal (default: 0); not with --by centre")
    parser.add_argument(
        "--by",
        choices=("patient", "centre"),
        default="patient",
        help="patient: classes even in every fold (default); centre: each fold holds one centre out",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folds file to write (.json)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Make, save and show the folds.

    Raises:
        TrainingError: labels that cannot be read or dealt; OUT is then as it was.
    """
    if options.out.exists() and not options.overwrite:
        raise OutputExistsError(
            f"{options.out} exists already; give another file, or --overwrite to replace it"
        )
    if options.by == "centre" and (options.folds is not None or options.seed is not None):
        raise FoldsError(
            "--by centre", ["every centre is a fold and there is no chance in it: no --folds, no --seed"]
        )
    folds = 5 if options.folds is None else options.folds
    seed = 0 if options.seed is None else options.seed
    records = _records(options.data) if options.data else read_label_table(options.labels)
    if options.by == "centre":
        made = leave_one_centre_out(records)
    else:
        made = make_folds(records, folds=folds, seed=seed)
    made.save(options.out)
    print(table(made))
    return {
        "out": str(options.out),
        "method": made.method,
        "folds": made.folds,
        "seed": made.seed,
        "patients": len(made.patients),
        "slides": len(records),
        "class_names": list(made.class_names),
        "fingerprint": made.fingerprint,
    }


def table(folds: Folds) -> str:
    """Patients, slides and patients of each class, one line a fold, as plain text."""
    names = folds.class_names
    header = ["fold", *(["centre"] if folds.centres else []), "patients", "slides", *names]
    lines = [header]
    for fold in range(folds.folds):
        inside = [patient for patient in folds.patients.values() if patient.fold == fold]
        lines.append(
            [
                str(fold),
                *([folds.centres[fold]] if folds.centres else []),
                str(len(inside)),
                str(sum(len(patient.image_ids) for patient in inside)),
                *(str(sum(patient.label == name for patient in inside)) for name in names),
            ]
        )
    return aligned(lines)


def _records(data: Path) -> list[SlideRecord]:
    """Rows of DIR/train.csv, or the usable slides of a tile store."""
    if (data / "train.csv").exists() or not data.is_dir():
        return read_label_table(data / "train.csv")
    from training.store.reader import TileStore  # pyarrow is loaded only where a store is read

    return list(TileStore.open(data).slides)
