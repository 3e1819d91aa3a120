"""The rows of a train.csv, wherever it lies and whether or not its slides are there."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from slides.labels import COLUMNS, SlideRecord
from training.errors import TableError


def read_label_table(path: Path | str, *, class_names: Sequence[str] | None = None) -> list[SlideRecord]:
    """Read a label file in the layout of STRIP AI (`slides.labels`), in which nothing but rows is looked at.

    Args:
        path: a CSV with image_id, center_id, patient_id, image_num, label in any order; further columns are ignored.
        class_names: the labels that may occur; None for any. One class alone is no problem here.

    Returns:
        one record a row, in the file's order; `path` of a record is where its .tif would be.

    Raises:
        TableError: with every problem found: a missing file, column or value, an image_id that occurs twice, an
            image_num that is no number, an unknown label, a patient in two classes.
    """
    path = Path(path)
    rows = _rows(path)
    problems: list[str] = []
    line_of: dict[str, int] = {}
    first_of_patient: dict[str, tuple[int, str]] = {}
    for line, row in rows:
        problems += _problems(line, row, class_names)
        image_id, patient_id, label = row["image_id"], row["patient_id"], row["label"]
        if image_id and line_of.setdefault(image_id, line) != line:
            problems.append(f"line {line}: image_id {image_id!r} is already on line {line_of[image_id]}")
        if patient_id and label:
            first_line, first_label = first_of_patient.setdefault(patient_id, (line, label))
            if first_label != label:
                problems.append(
                    f"line {line}: patient {patient_id!r} is {label} here, {first_label} on line {first_line}"
                )
    if not rows:
        problems.append("has a header but no row")
    if problems:
        raise TableError(str(path), problems)
    folder = path.parent / "train"
    return [
        SlideRecord(
            row["image_id"],
            row["center_id"],
            row["patient_id"],
            int(row["image_num"]),
            row["label"],
            folder / f"{row['image_id']}.tif",
        )
        for _, row in rows
    ]


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            missing = [column for column in COLUMNS if column not in header]
            if missing:
                raise TableError(
                    str(path),
                    [f"column {', '.join(missing)} missing; the header must name {','.join(COLUMNS)}"],
                )
            return [
                (reader.line_num, {column: (row[column] or "").strip() for column in COLUMNS})
                for row in reader
                if any(row.values())
            ]
    except FileNotFoundError:
        raise TableError(
            str(path), [f"is missing; it must hold the columns {','.join(COLUMNS)}, one row a slide"]
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TableError(str(path), [f"cannot be read as UTF-8 CSV: {error}"]) from error


def _problems(line: int, row: dict[str, str], class_names: Sequence[str] | None) -> Iterator[str]:
    for column in COLUMNS:
        if not row[column]:
            yield f"line {line}: {column} is missing"
    if row["image_num"] and not (row["image_num"].isascii() and row["image_num"].isdigit()):
        yield f"line {line}: image_num {row['image_num']!r} is not a whole number"
    if class_names is not None and row["label"] and row["label"] not in class_names:
        yield f"line {line}: label {row['label']!r} is none of {', '.join(class_names)}"
