"""Labels in the layout of STRIP AI: `train.csv` beside `train/<image_id>.<suffix>`.

`train.csv` has the columns image_id, center_id, patient_id, image_num, label (further columns are ignored).
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from slides.errors import LabelsError

COLUMNS = ("image_id", "center_id", "patient_id", "image_num", "label")
SLIDE_SUFFIXES = (".tif", ".tiff", ".svs", ".ndpi", ".scn", ".mrxs", ".vms", ".bif", ".jpg", ".jpeg", ".png")


@dataclasses.dataclass(frozen=True)
class SlideRecord:
    """One row of train.csv with the file that belongs to it.

    Attributes:
        image_num: number of the slide within its patient, from 0.
        path: the slide; where there is none (`require_files` False, `allow_missing`), the .tif that was looked for.
    """

    image_id: str
    center_id: str
    patient_id: str
    image_num: int
    label: str
    path: Path


def patient_of(image_id: str) -> str:
    """Patient of a slide named as in STRIP AI: `<patient>_<number>`; any other name is its own patient."""
    match = re.fullmatch(r"(.+)_\d+", image_id)
    return match[1] if match else image_id


def read_labels(
    data_dir: Path | str,
    *,
    class_names: Sequence[str],
    require_files: bool = True,
    allow_missing: bool = False,
) -> list[SlideRecord]:
    """Read `data_dir`/train.csv and find the slide of each row in `data_dir`/train/.

    Args:
        data_dir: folder that holds train.csv and train/.
        class_names: the labels a model knows; every other label is a problem.
        require_files: False skips the look for files (rows alone are checked).
        allow_missing: a row without slide is no problem; its path is the .tif that was looked for, and whoever opens it
            learns that it is missing.

    Returns:
        one record a row, in the file's order.

    Raises:
        LabelsError: with every problem found: a missing file, column or value, a duplicate or unsafe
            image_id, an unknown label, labels of one class only, a patient in two classes, a row without
            slide, a slide without row, two files for one row.
    """
    data_dir = Path(data_dir)
    table = data_dir / "train.csv"
    rows, problems = _read_rows(table)
    records, files_of = [], _slide_files(data_dir / "train") if require_files else {}
    if require_files and not (data_dir / "train").is_dir():
        problems.append(f"folder {data_dir / 'train'} is missing; slides belong there as <image_id>.tif")
    lines_of: dict[str, int] = {}
    for line, row in rows:
        row_problems = [*_row_problems(line, row, class_names)]
        image_id = row["image_id"]
        if image_id and image_id in lines_of:
            row_problems.append(f"line {line}: image_id {image_id!r} is already on line {lines_of[image_id]}")
        lines_of.setdefault(image_id, line)
        files = files_of.get(image_id, [])
        if require_files and (data_dir / "train").is_dir() and _is_safe(image_id):
            if not files and not allow_missing:
                row_problems.append(f"line {line}: no slide train/{image_id}.tif (nor .svs, .jpg, .png, ...)")
            if len(files) > 1:
                row_problems.append(
                    f"line {line}: {len(files)} files: {', '.join(file.name for file in files)}; keep one"
                )
        if row_problems:
            problems += row_problems
            continue
        path = files[0] if files else data_dir / "train" / f"{image_id}.tif"
        records.append(
            SlideRecord(
                image_id, row["center_id"], row["patient_id"], int(row["image_num"]), row["label"], path
            )
        )
    problems += [
        f"slide train/{files[0].name} has no row in train.csv; add one or move the file away"
        for image_id, files in sorted(files_of.items())
        if rows and image_id not in lines_of
    ]
    problems += _class_problems(rows, class_names)
    if problems:
        raise LabelsError(str(table), problems)
    return records


def _read_rows(table: Path) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    """Rows as (line, stripped values of COLUMNS), and what keeps the table from being read."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            missing = [column for column in COLUMNS if column not in header]
            if missing:
                return [], [f"column {', '.join(missing)} missing; the header must name {','.join(COLUMNS)}"]
            rows = [
                (reader.line_num, {column: (row[column] or "").strip() for column in COLUMNS})
                for row in reader
                if any(value for value in row.values())
            ]
    except FileNotFoundError:
        return [], [f"file is missing; it must hold the columns {','.join(COLUMNS)}, one row a slide"]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        return [], [f"cannot be read as UTF-8 CSV: {error}"]
    return rows, [] if rows else ["has a header but no row"]


def _slide_files(folder: Path) -> dict[str, list[Path]]:
    files_of: dict[str, list[Path]] = {}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in SLIDE_SUFFIXES and not path.name.startswith(".") and path.is_file():
                files_of.setdefault(path.stem, []).append(path)
    return files_of


def _is_safe(image_id: str) -> bool:
    return bool(image_id) and image_id.isprintable() and not re.search(r"[/\\]|^\.", image_id)


def _row_problems(line: int, row: dict[str, str], class_names: Sequence[str]) -> Iterator[str]:
    for column in COLUMNS:
        if not row[column]:
            yield f"line {line}: {column} is missing"
    if row["image_id"] and not _is_safe(row["image_id"]):
        yield f"line {line}: image_id {row['image_id']!r} must be a file name (no / or \\, no first dot)"
    if row["image_num"] and not re.fullmatch(r"[0-9]+", row["image_num"]):
        yield f"line {line}: image_num {row['image_num']!r} is not a whole number"
    if row["label"] and row["label"] not in class_names:
        yield f"line {line}: label {row['label']!r} is none of {', '.join(class_names)}"


def _class_problems(rows: Sequence[tuple[int, dict[str, str]]], class_names: Sequence[str]) -> Iterator[str]:
    first: dict[str, tuple[int, str]] = {}
    for line, row in rows:
        patient_id, label = row["patient_id"], row["label"]
        if not patient_id or label not in class_names:
            continue
        first_line, first_label = first.setdefault(patient_id, (line, label))
        if label != first_label:
            yield f"line {line}: patient {patient_id!r} is {label} here, {first_label} on line {first_line}"
    labels = {row["label"] for _, row in rows} & set(class_names)
    if len(labels) == 1:
        yield f"every row has the label {labels.pop()}; at least two of {', '.join(class_names)} are needed"
