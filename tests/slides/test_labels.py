from __future__ import annotations

from pathlib import Path

import pytest

from slides.errors import LabelsError
from slides.labels import SlideRecord, patient_of, read_labels

CLASSES = ("CE", "LAA")
HEADER = "image_id,center_id,patient_id,image_num,label"
GOOD = ["aa_0,1,aa,0,CE", "aa_1,1,aa,1,CE", "bb_0,2,bb,0,LAA"]


def write(folder: Path, rows: list[str], *, header: str = HEADER, slides: list[str] | None = None) -> Path:
    (folder / "train").mkdir(exist_ok=True)
    (folder / "train.csv").write_text("\n".join([header, *rows]) + "\n")
    for name in slides if slides is not None else [row.split(",")[0] + ".tif" for row in rows]:
        (folder / "train" / name).touch()
    return folder


def problems(folder: Path, **options: bool) -> str:
    with pytest.raises(LabelsError) as caught:
        read_labels(folder, class_names=CLASSES, **options)
    assert str(folder / "train.csv") in str(caught.value)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return "\n".join(caught.value.problems)


def test_rows_become_records_in_the_order_of_the_file(tmp_path: Path) -> None:
    write(tmp_path, GOOD, slides=["aa_0.tif", "aa_1.SVS", "bb_0.jpg", ".hidden.tif", "notes.txt"])
    records = read_labels(tmp_path, class_names=CLASSES)
    assert records[1] == SlideRecord("aa_1", "1", "aa", 1, "CE", tmp_path / "train" / "aa_1.SVS")
    assert [record.path.suffix for record in records] == [".tif", ".SVS", ".jpg"]


def test_byte_order_mark_windows_lines_spaces_and_further_columns(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    text = (tmp_path / "train.csv").read_text().replace("label", "label, notes").replace("CE", " CE ,x")
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert [record.label for record in read_labels(tmp_path, class_names=CLASSES)] == ["CE", "CE", "LAA"]


def test_files_need_not_be_there_if_nobody_asks(tmp_path: Path) -> None:
    write(tmp_path, GOOD, slides=[])
    assert len(read_labels(tmp_path, class_names=CLASSES, require_files=False)) == 3


def test_table_is_missing(tmp_path: Path) -> None:
    assert "file is missing" in problems(tmp_path)


def test_folder_of_slides_is_missing(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("\n".join([HEADER, *GOOD]))
    assert "train is missing" in problems(tmp_path)


def test_column_is_missing(tmp_path: Path) -> None:
    write(tmp_path, ["aa_0,1,aa,CE"], header="image_id,center_id,patient_id,label")
    assert "column image_num missing" in problems(tmp_path)


def test_no_rows_and_not_text(tmp_path: Path) -> None:
    write(tmp_path, [])
    assert "no row" in problems(tmp_path)
    (tmp_path / "train.csv").write_bytes(b"\xff\xfe\x00binary")
    assert "UTF-8" in problems(tmp_path)


def test_one_class(tmp_path: Path) -> None:
    write(tmp_path, GOOD[:2])
    assert "every row has the label CE" in problems(tmp_path)


def test_patient_in_two_classes(tmp_path: Path) -> None:
    write(tmp_path, [*GOOD, "aa_2,1,aa,2,LAA"])
    assert "line 5: patient 'aa' is LAA here, CE on line 2" in problems(tmp_path)


def test_duplicate_row_unknown_label_and_bad_number_together(tmp_path: Path) -> None:
    write(tmp_path, [*GOOD, "aa_0,1,aa,0,CE", "cc_0,1,cc,zero,Unknown", "dd_0,,dd,0,CE"])
    found = problems(tmp_path)
    assert "line 5: image_id 'aa_0' is already on line 2" in found
    assert "line 6: label 'Unknown' is none of CE, LAA" in found
    assert "line 6: image_num 'zero' is not a whole number" in found
    assert "line 7: center_id is missing" in found
    assert len(found.splitlines()) == 4


def test_row_without_slide_slide_without_row_and_two_slides(tmp_path: Path) -> None:
    write(tmp_path, GOOD, slides=["aa_0.tif", "aa_0.svs", "aa_1.tif", "zz_0.tif"])
    found = problems(tmp_path)
    assert "line 4: no slide train/bb_0.tif" in found
    assert "slide train/zz_0.tif has no row" in found
    assert "line 2: 2 files: aa_0.svs, aa_0.tif" in found


def test_a_row_without_slide_may_be_allowed(tmp_path: Path) -> None:
    write(tmp_path, GOOD, slides=["aa_0.svs", "aa_1.tif"])
    records = read_labels(tmp_path, class_names=CLASSES, allow_missing=True)
    assert [record.path.name for record in records] == ["aa_0.svs", "aa_1.tif", "bb_0.tif"]
    (tmp_path / "train" / "zz_0.tif").touch()
    assert "zz_0.tif has no row" in problems(tmp_path, allow_missing=True)


@pytest.mark.parametrize("image_id", ["../aa_0", "a/b", "a\\b", ".aa", "a\0b", "/etc/passwd"])
def test_unsafe_image_id(tmp_path: Path, image_id: str) -> None:
    write(tmp_path, GOOD)
    with (tmp_path / "train.csv").open("a") as stream:
        stream.write(f"{image_id},1,ee,0,CE\n")
    found = problems(tmp_path)
    assert "must be a file name" in found or "UTF-8 CSV" in found  # csv refuses NUL before Python 3.11


def test_short_row(tmp_path: Path) -> None:
    write(tmp_path, [*GOOD, "ff_0,1"])
    assert "line 5: label is missing" in problems(tmp_path)


@pytest.mark.parametrize(
    ("image_id", "patient_id"), [("006388_0", "006388"), ("a_b_12", "a_b"), ("slide", "slide"), ("_1", "_1")]
)
def test_patient_of(image_id: str, patient_id: str) -> None:
    assert patient_of(image_id) == patient_id
