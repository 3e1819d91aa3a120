"""Tables of predictions: `image_id` and one probability column a class, read strictly and joined by image_id."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slides.labels import SlideRecord
from training.errors import TableError

SUM_TOLERANCE = 1e-3
"""Rows whose sum is this near to 1 are divided by it; probabilities are often written with three or four digits."""
VALUE_TOLERANCE = 1e-6
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Table:
    """Predictions of one member.

    Attributes:
        source: the file.
        class_names: in the order of the file's columns; probabilities have that order.
        rows: image_id -> probabilities [K], each 0..1, sum 1.
    """

    source: str
    class_names: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Members:
    """Predictions of M members for the same N slides.

    Attributes:
        names: one a member.
        class_names: K, in the order of the first table's columns.
        records: the N slides with their labels, in the order of the label file.
        probabilities_MNK: float64.
    """

    names: tuple[str, ...]
    class_names: tuple[str, ...]
    records: tuple[SlideRecord, ...]
    probabilities_MNK: NDArray[np.float64]

    @property
    def labels_N(self) -> NDArray[np.intp]:
        """Class index of each slide."""
        index_of = {name: index for index, name in enumerate(self.class_names)}
        return np.array([index_of[record.label] for record in self.records], dtype=np.intp)

    @property
    def patients_N(self) -> NDArray[np.str_]:
        """Patient of each slide."""
        return np.array([record.patient_id for record in self.records])

    @property
    def patient_ids(self) -> list[str]:
        """The P patients, sorted; the order of whatever `by_patient` returns."""
        return sorted({record.patient_id for record in self.records})

    @property
    def labels_P(self) -> NDArray[np.intp]:
        """Class index of each patient."""
        _, first_P = np.unique(self.patients_N, return_index=True)
        return self.labels_N[first_P]

    def by_patient(self, values_N: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean over the slides of each patient: [..., N, K] -> [..., P, K]."""
        order_N = np.argsort(self.patients_N, kind="stable")
        _, first_P, slides_P = np.unique(self.patients_N[order_N], return_index=True, return_counts=True)
        return np.add.reduceat(values_N[..., order_N, :], first_P, axis=-2) / slides_P[:, None]


def read_members(
    paths: Sequence[Path | str],
    records: Sequence[SlideRecord],
    *,
    class_names: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    subset: bool = False,
) -> Members:
    """Read one table a member and join them by image_id.

    Args:
        records: the labelled slides.
        class_names: None takes the labels that occur in `records`.
        names: of the members; None takes the paths.
        subset: slides of `records` that no table has are left out, where all tables lack the same ones (tables of one
            held-out fold); else every labelled slide must be in every table.

    Raises:
        TableError: with the problems of all tables at once: a file that cannot be read, a class without column or a
            column of an unknown class, an image_id that is missing, double or unlabelled, a value that is no
            probability, a row whose sum is not 1 (within SUM_TOLERANCE), tables of different slides.
    """
    known = tuple(class_names) if class_names else tuple(sorted({record.label for record in records}))
    problems: list[str] = []
    tables: list[Table] = []
    if len(set(map(str, paths))) < len(paths):
        problems.append("the same file is given twice; a member counts more by --weights")
    for path in paths:
        table, own = _read(Path(path), known)
        tables.append(table)
        problems += [f"{path}: {problem}" for problem in _cut(own)]
    problems += _differences([table for table in tables if table.rows], records, subset)
    if problems:
        raise TableError("predictions", problems)
    order = tables[0].class_names
    chosen = tuple(record for record in records if record.image_id in tables[0].rows)
    probabilities_MNK = np.array(
        [
            np.array([table.rows[record.image_id] for record in chosen])[
                :, [table.class_names.index(name) for name in order]
            ]
            for table in tables
        ]
    )
    return Members(tuple(names or map(str, paths)), order, chosen, probabilities_MNK)


def snapshot_tables(run_dir: Path | str) -> list[Path]:
    """RUN/snapshots/<n>/held_out.csv of a training run or a cross-validation, by n.

    Raises:
        TableError: there are none.
    """
    found = [
        (int(path.parent.name), path)
        for path in Path(run_dir).glob("snapshots/*/held_out.csv")
        if path.parent.name.isdecimal()
    ]
    if not found:
        raise TableError(
            str(run_dir),
            ['has no snapshots/<n>/held_out.csv; train with schedule = "cyclic", or give tables with --oof'],
        )
    return [path for _, path in sorted(found)]


def _read(path: Path, class_names: Sequence[str]) -> tuple[Table, list[str]]:
    """A table and all that is wrong with it; its rows are those that are right."""
    nothing = Table(str(path), tuple(class_names), {})
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = [name.strip() for name in next(reader, [])]
            lines = [
                (reader.line_num, [cell.strip() for cell in cells])
                for cells in reader
                if any(map(str.strip, cells))
            ]
    except FileNotFoundError:
        return nothing, ["there is no such file"]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        return nothing, [f"cannot be read as UTF-8 CSV: {error}"]
    columns, problems = _columns(header, class_names)
    if problems:
        return nothing, problems
    if not lines:
        return nothing, ["has a header but no row"]
    image_column = header.index("image_id")
    order = tuple(sorted(columns, key=columns.__getitem__))
    rows: dict[str, tuple[float, ...]] = {}
    seen: dict[str, int] = {}
    for line, cells in lines:
        if len(cells) != len(header):
            problems.append(f"line {line}: has {len(cells)} cells, the header {len(header)}")
            continue
        image_id = cells[image_column]
        if not image_id:
            problems.append(f"line {line}: image_id is missing")
        elif seen.setdefault(image_id, line) != line:
            problems.append(f"line {line}: image_id {image_id!r} is already on line {seen[image_id]}")
        values, wrong = _probabilities({name: cells[columns[name]] for name in order})
        problems += [f"line {line}: {problem}" for problem in wrong]
        rows.setdefault(image_id, values)
    rows.pop("", None)
    return Table(str(path), order, rows), problems


def _columns(header: Sequence[str], class_names: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Column of each class, named `<class>` or `p_<class>`."""
    problems = [
        f"column {name!r} occurs {header.count(name)} times"
        for name in dict.fromkeys(header)
        if name and header.count(name) > 1
    ]
    if "image_id" not in header:
        problems.append(f"column image_id is missing; the header has {', '.join(header) or 'nothing'}")
    columns: dict[str, int] = {}
    for name in class_names:
        present = [column for column in (name, f"p_{name}") if column in header]
        if len(present) == 2:
            problems.append(f"class {name} has two columns, {present[0]!r} and {present[1]!r}; keep one")
        elif not present:
            problems.append(
                f"class {name} has no column, neither {name!r} nor 'p_{name}'; the header has {', '.join(header)}"
            )
        else:
            columns[name] = header.index(present[0])
    taken = {header[column] for column in columns.values()}
    problems += [
        f"column {column!r} is of a class that the labels do not have ({', '.join(class_names)}); "
        "name all classes with --class-names if it is one"
        for column in header
        if re.match(r"p_.", column) and column not in taken and column[2:] not in class_names
    ]
    return columns, problems


def _probabilities(cells: Mapping[str, str]) -> tuple[tuple[float, ...], list[str]]:
    values, problems = [], []
    for name, cell in cells.items():
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            problems.append(
                f"probability of {name} is {cell!r}, not a number" if cell else f"{name} is missing"
            )
        elif not -VALUE_TOLERANCE <= value <= 1 + VALUE_TOLERANCE:
            problems.append(f"probability of {name} is {cell}, not within 0..1")
        values.append(min(max(value, 0.0), 1.0))
    total = sum(values)
    if not problems and abs(total - 1) > SUM_TOLERANCE:
        problems.append(f"probabilities of {', '.join(cells)} sum to {total:.6g}, not 1")
    return tuple(value / total for value in values) if not problems else tuple(values), problems


def _differences(tables: Sequence[Table], records: Sequence[SlideRecord], subset: bool) -> list[str]:
    labelled = {record.image_id: None for record in records}
    problems = []
    for table in tables:
        strange = [image_id for image_id in table.rows if image_id not in labelled]
        if strange:
            problems.append(f"{table.source}: {_named(strange)} not in the labels")
        expected = tables[0].rows if subset else labelled
        lacking = [image_id for image_id in expected if image_id not in table.rows and image_id in labelled]
        if lacking:
            whose = f"that {tables[0].source} has" if subset else "of the labels"
            hint = "" if subset else "; --subset allows that where all tables lack the same ones"
            problems.append(f"{table.source}: lacks {_named(lacking)} {whose}{hint}")
        more = [image_id for image_id in table.rows if image_id in labelled and image_id not in expected]
        if more:
            problems.append(f"{table.source}: has {_named(more)} that {tables[0].source} lacks")
    return problems


def _cut(problems: Sequence[str]) -> list[str]:
    more = len(problems) - _SHOWN
    return [*problems[:_SHOWN], *([f"... and {more} more problems of this file"] if more > 0 else [])]


def _named(image_ids: Sequence[str]) -> str:
    more = f", ... ({len(image_ids)} in all)" if len(image_ids) > 5 else ""
    return f"slide{'s' if len(image_ids) != 1 else ''} {', '.join(image_ids[:5])}{more}"
