"""training/ensembles/tables.py"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from slides.labels import SlideRecord
from training.ensembles.tables import read_members, snapshot_tables
from training.errors import TableError
from training.label_table import read_label_table

from .conftest import Files

RECORDS = [
    SlideRecord(image_id, "1", image_id[0], 0, label, Path("x.tif"))
    for image_id, label in (("a_0", "CE"), ("a_1", "CE"), ("b_0", "LAA"))
]
GOOD = ("image_id,CE,LAA", "a_0,0.7,0.3", "a_1,0.6,0.4", "b_0,0.2,0.8")


def test_columns_and_rows_in_any_order_are_joined_by_name(files: Files) -> None:
    read = read_members(files.tables, read_label_table(files.labels))
    assert read.class_names == ("CE", "LAA")
    assert [one.image_id for one in read.records] == [one.image_id for one in files.members.records]
    assert np.abs(read.probabilities_MNK - files.members.probabilities_MNK).max() < 1e-12
    assert (read.labels_N == files.members.labels_N).all()


def test_patients_are_means_of_their_slides(table: Callable[..., Path]) -> None:
    read = read_members([table("a.csv", *GOOD)], RECORDS)
    assert read.patient_ids == ["a", "b"]
    assert read.labels_P.tolist() == [0, 1]
    assert read.by_patient(read.probabilities_MNK).tolist() == [[pytest.approx([0.65, 0.35]), [0.2, 0.8]]]
    shuffled = read_members([table("a.csv", *GOOD)], [RECORDS[0], RECORDS[2], RECORDS[1]])
    assert shuffled.by_patient(shuffled.probabilities_MNK[0])[0].tolist() == pytest.approx([0.65, 0.35])


def test_the_order_of_classes_is_that_of_the_first_table(table: Callable[..., Path]) -> None:
    first = table("a.csv", "p_LAA,p_CE,image_id", "0.3,0.7,a_0", "0.4,0.6,a_1", "0.8,0.2,b_0")
    read = read_members([first, table("b.csv", *GOOD)], RECORDS)
    assert read.class_names == ("LAA", "CE")
    assert (read.probabilities_MNK[0] == read.probabilities_MNK[1]).all()


def test_rounded_rows_are_divided_by_their_sum(table: Callable[..., Path]) -> None:
    rounded = table("a.csv", "image_id,CE,LAA", "a_0,0.3333,0.6666", "a_1,0.6,0.4", "b_0,1.0000000001,-1e-9")
    read = read_members([rounded], RECORDS)
    assert np.abs(read.probabilities_MNK.sum(axis=2) - 1).max() < 1e-12
    assert read.probabilities_MNK[0, 2].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("image_id,CE,LAA", "a_0,0.7,0.3", "a_1,0.6,0.4"), "lacks slide b_0 of the labels"),
        ((*GOOD, "c_0,0.5,0.5"), "slide c_0 not in the labels"),
        ((*GOOD, "a_0,0.7,0.3"), "line 5: image_id 'a_0' is already on line 2"),
        ((*GOOD[:3], ",0.2,0.8"), "line 4: image_id is missing"),
        ((*GOOD[:3], "b_0,-0.2,1.2"), "probability of CE is -0.2, not within 0..1"),
        ((*GOOD[:3], "b_0,0.2,0.7"), "line 4: probabilities of CE, LAA sum to 0.9, not 1"),
        ((*GOOD[:3], "b_0,nan,0.8"), "line 4: probability of CE is 'nan', not a number"),
        ((*GOOD[:3], "b_0,inf,0.8"), "probability of CE is inf, not within 0..1"),
        ((*GOOD[:3], "b_0,high,0.8"), "probability of CE is 'high', not a number"),
        ((*GOOD[:3], "b_0,,0.8"), "line 4: CE is missing"),
        ((*GOOD[:3], "b_0,0.2"), "line 4: has 2 cells, the header 3"),
        (("image_id,CE", "a_0,1", "a_1,1", "b_0,0"), "class LAA has no column"),
        (("slide,CE,LAA", "a_0,0.7,0.3"), "column image_id is missing"),
        (("image_id,CE,p_CE,LAA", "a_0,1,1,0"), "class CE has two columns"),
        (("image_id,CE,CE,LAA", "a_0,1,1,0"), "column 'CE' occurs 2 times"),
        (
            ("image_id,p_CE,p_LAA,p_Other", "a_0,1,0,0"),
            "column 'p_Other' is of a class that the labels do not have",
        ),
        (("image_id,CE,LAA",), "has a header but no row"),
        ((), "column image_id is missing"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(
    table: Callable[..., Path], lines: tuple[str, ...], message: str
) -> None:
    with pytest.raises(TableError) as caught:
        read_members([table("a.csv", *lines)], RECORDS)
    assert any(message in problem for problem in caught.value.problems), caught.value


def test_problems_of_all_tables_come_at_once(table: Callable[..., Path], tmp_path: Path) -> None:
    bad = table("bad.csv", *GOOD[:2], "a_1,2,0", "b_0,0.5,0.6")
    short = table("short.csv", *GOOD[:3])
    with pytest.raises(TableError) as caught:
        read_members([bad, short, tmp_path / "none.csv"], RECORDS)
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    assert "bad.csv: line 3" in told
    assert "bad.csv: line 4" in told
    assert "short.csv: lacks slide b_0" in told
    assert "none.csv: there is no such file" in told


def test_tables_of_different_slides_are_refused_as_subsets_too(table: Callable[..., Path]) -> None:
    part, other = table("a.csv", *GOOD[:3]), table("b.csv", GOOD[0], *GOOD[2:])
    with pytest.raises(TableError) as caught:
        read_members([part, other], RECORDS, subset=True)
    told = "\n".join(caught.value.problems)
    assert "lacks slide a_0 that" in told
    assert "has slide b_0 that" in told
    assert len(read_members([part], RECORDS, subset=True).records) == 2


def test_a_table_given_twice_is_refused(table: Callable[..., Path]) -> None:
    good = table("a.csv", *GOOD)
    with pytest.raises(TableError, match="given twice"):
        read_members([good, good], RECORDS)


def test_snapshots_are_found_in_order_of_their_numbers(tmp_path: Path) -> None:
    for number in ("2", "10", "1", "best"):
        (tmp_path / "snapshots" / number).mkdir(parents=True)
        (tmp_path / "snapshots" / number / "held_out.csv").touch()
    assert [path.parent.name for path in snapshot_tables(tmp_path)] == ["1", "2", "10"]
    with pytest.raises(TableError, match="cyclic"):
        snapshot_tables(tmp_path / "snapshots")
