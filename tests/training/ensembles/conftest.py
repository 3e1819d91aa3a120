"""Tables of predictions, good ones and bad ones."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from slides.labels import SlideRecord
from training.ensembles.tables import Members


def made_members(
    patients: int = 80,
    qualities: Sequence[float] = (1.5, 1.5, 1.5),
    *,
    classes: int = 2,
    seed: int = 0,
    shared: float = 0.5,
) -> Members:
    """Answers of members that differ in how much they know; 1 to 3 slides a patient, the first class twice as often."""
    generator = np.random.default_rng(seed)
    names = ("CE", "LAA", "Other")[:classes]
    shares = np.array([2.0, *[1.0] * (classes - 1)])
    records, labels = [], []
    for number in range(patients):
        label = (
            number % classes
            if number < 3 * classes
            else int(generator.choice(classes, p=shares / shares.sum()))
        )
        for slide in range(int(generator.integers(1, 4))):
            image_id = f"p{number:03d}_{slide}"
            records.append(
                SlideRecord(
                    image_id,
                    str(number % 4),
                    f"p{number:03d}",
                    slide,
                    names[label],
                    Path(f"train/{image_id}.tif"),
                )
            )
            labels.append(label)
    truth_NK = np.eye(classes)[labels]
    noise_NK = generator.normal(size=truth_NK.shape)
    logits_MNK = [
        quality * truth_NK + shared * noise_NK + generator.normal(size=truth_NK.shape)
        for quality in qualities
    ]
    return Members(
        tuple(f"m{number}" for number in range(len(qualities))),
        names,
        tuple(records),
        softmax(logits_MNK, axis=2),
    )


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return path


@dataclasses.dataclass(frozen=True)
class Files:
    """Tables on disk and what is in them."""

    labels: Path
    tables: tuple[Path, ...]
    members: Members


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Three tables with differing order of rows and columns and of both ways to name columns."""
    return write_files(tmp_path, made_members())


def write_files(folder: Path, members: Members) -> Files:
    header = ("label", "image_num", "patient_id", "image_id", "center_id")
    labels = write_csv(
        folder / "train.csv",
        [
            header,
            *(
                [one.label, one.image_num, one.patient_id, one.image_id, one.center_id]
                for one in members.records
            ),
        ],
    )
    tables = []
    for number, values_NK in enumerate(members.probabilities_MNK):
        order = np.random.default_rng(number).permutation(len(values_NK))
        prefix, columns = ("p_" if number % 2 else ""), [*range(values_NK.shape[1])]
        columns = columns[::-1] if number % 2 else columns
        rows: list[Sequence[object]] = [
            ["fold", *(prefix + members.class_names[k] for k in columns), "image_id"],
            *(
                [n % 5, *(repr(float(values_NK[n, k])) for k in columns), members.records[n].image_id]
                for n in order
            ),
        ]
        tables.append(write_csv(folder / f"oof {number}.csv", rows))
    return Files(labels, tuple(tables), members)


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """A small CSV from lines."""

    def write(name: str, *lines: str) -> Path:
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return path

    return write
