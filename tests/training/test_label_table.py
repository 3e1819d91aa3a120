"""training/label_table.py"""

from __future__ import annotations

from pathlib import Path

import pytest

from training.errors import TableError
from training.label_table import read_label_table


def test_columns_may_stand_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(
        "label,image_num,more,patient_id,image_id,center_id\nCE,0,x,p,p_0,3\nCE,1,,p,p_1,3\n", "utf-8-sig"
    )
    first, second = read_label_table(path)
    assert (first.image_id, first.patient_id, first.center_id, first.label) == ("p_0", "p", "3", "CE")
    assert second.image_num == 1


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    lines = (
        "image_id,center_id,patient_id,image_num,label",
        "p_0,1,p,0,CE",
        "p_0,1,p,x,LAA",
        ",1,q,0,Other",
        "r_0",
    )
    path.write_text("\n".join(lines))
    with pytest.raises(TableError) as caught:
        read_label_table(path, class_names=["CE", "LAA"])
    told = "\n".join(caught.value.problems)
    for part in (
        "line 3: image_num 'x' is not a whole number",
        "line 3: image_id 'p_0' is already on line 2",
        "line 3: patient 'p' is LAA here, CE on line 2",
        "line 4: image_id is missing",
        "line 4: label 'Other' is none of CE, LAA",
        "line 5: label is missing",
    ):
        assert part in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is missing; it must hold"),
        ("", "column image_id, center_id"),
        ("image_id,label\na,CE\n", "column center_id, patient_id, image_num missing"),
        ("image_id,center_id,patient_id,image_num,label\n", "no row"),
        ("\xff\xfe", "cannot be read as UTF-8 CSV"),
    ],
)
def test_files_that_are_no_label_tables(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "labels.csv"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(TableError, match=message):
        read_label_table(path)
