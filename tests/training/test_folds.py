"""training/folds.py, folds_file.py, folds_command.py"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slides.labels import SlideRecord
from training.__main__ import COMMANDS
from training.commands import main
from training.errors import DataError, FoldsError
from training.folds import Folds, leave_one_centre_out, make_folds, split, split_by_patient


def records(patients: dict[str, str], slides_each: int = 3) -> list[SlideRecord]:
    return [
        SlideRecord(f"{patient}_{number}", "1", patient, number, label, Path(f"{patient}_{number}.tif"))
        for patient, label in patients.items()
        for number in range(slides_each)
    ]


@pytest.fixture
def uneven() -> list[SlideRecord]:
    """CE three times as frequent as LAA, 1 to 4 slides a patient."""
    made = []
    for patient in range(24):
        label = "LAA" if patient % 4 == 0 else "CE"
        made += records({f"p{patient}": label}, slides_each=1 + patient % 4)
    return made


@pytest.mark.parametrize("seed", range(5))
def test_no_patient_is_on_both_sides_and_none_is_lost(uneven: list[SlideRecord], seed: int) -> None:
    seen: list[str] = []
    for fold in range(4):
        train, held_out = split_by_patient(uneven, folds=4, held_out_fold=fold, seed=seed)
        assert not {record.patient_id for record in train} & {record.patient_id for record in held_out}
        assert {record.label for record in train} == {record.label for record in held_out} == {"CE", "LAA"}
        assert len(train) + len(held_out) == len(uneven)
        seen += [record.image_id for record in held_out]
    assert sorted(seen) == sorted(record.image_id for record in uneven)


def test_order_of_records_does_not_matter_but_the_seed_does(uneven: list[SlideRecord]) -> None:
    shuffled = uneven.copy()
    random.Random(0).shuffle(shuffled)
    one = split_by_patient(uneven, folds=4, held_out_fold=1, seed=1)
    assert split_by_patient(shuffled, folds=4, held_out_fold=1, seed=1) == one
    assert split_by_patient(uneven, folds=4, held_out_fold=1, seed=2) != one


def test_fewer_patients_than_folds_are_named() -> None:
    patients = {"a": "CE", "b": "CE", "c": "CE", "d": "LAA"}
    with pytest.raises(DataError, match="class LAA has 1 patient, fewer than 3 folds") as caught:
        split_by_patient(records(patients), folds=3, held_out_fold=0, seed=0)
    assert len(caught.value.problems) == 1


def test_one_class_cannot_be_split() -> None:
    with pytest.raises(DataError, match="only one class: CE"):
        split_by_patient(records({"a": "CE", "b": "CE"}), folds=2, held_out_fold=0, seed=0)
    with pytest.raises(DataError, match="no slide at all"):
        split_by_patient([], folds=2, held_out_fold=0, seed=0)


def random_records(generator: random.Random) -> list[SlideRecord]:
    """A table of 2 to 4 classes, 1 to 6 centres, 10 to 60 patients with 1 to 8 slides each, rows in any order."""
    classes = ["CE", "LAA", "Other", "Unknown"][: generator.randint(2, 4)]
    made = []
    for patient in range(generator.randint(10, 60)):
        label = classes[patient % len(classes)] if patient < 3 * len(classes) else generator.choice(classes)
        center = str(generator.randint(1, 6))
        for number in range(generator.randint(1, 8)):
            name = f"p{patient}_{number}"
            made.append(SlideRecord(name, center, f"p{patient}", number, label, Path(f"{name}.tif")))
    generator.shuffle(made)
    return made


@pytest.mark.parametrize("seed", range(40))
def test_no_patient_is_in_two_folds_whatever_the_table(seed: int) -> None:
    made = random_records(random.Random(seed))
    folds = make_folds(made, folds=3, seed=seed)
    held_out_in: dict[str, set[int]] = {}
    seen: list[str] = []
    for fold in range(folds.folds):
        train, held_out = split(made, folds, fold)
        assert {record.label for record in train} == {record.label for record in held_out}
        assert not {record.patient_id for record in train} & {record.patient_id for record in held_out}
        assert len(train) + len(held_out) == len(made)
        for record in held_out:
            held_out_in.setdefault(record.patient_id, set()).add(fold)
            seen.append(record.image_id)
    assert sorted(seen) == sorted(record.image_id for record in made)
    assert all(len(folds_of_patient) == 1 for folds_of_patient in held_out_in.values())


@pytest.mark.parametrize("seed", range(20))
def test_a_held_out_centre_is_trained_on_nowhere(seed: int) -> None:
    made = random_records(random.Random(seed))
    centres_of = {one.label: {two.center_id for two in made if two.label == one.label} for one in made}
    if any(len(centres) == 1 for centres in centres_of.values()):
        with pytest.raises(DataError, match="only"):
            leave_one_centre_out(made)
        return
    folds = leave_one_centre_out(made)
    assert sorted(folds.centres, key=int) == list(folds.centres)
    for fold, centre in enumerate(folds.centres):
        train, held_out = split(made, folds, fold)
        assert {record.center_id for record in held_out} == {centre}
        assert centre not in {record.center_id for record in train}


def test_the_file_gives_the_same_folds_as_the_seed(uneven: list[SlideRecord], tmp_path: Path) -> None:
    folds = make_folds(uneven, folds=4, seed=1)
    folds.save(tmp_path / "deep" / "folds.json")
    read = Folds.load(tmp_path / "deep" / "folds.json")
    assert read == folds
    assert read.fingerprint == folds.fingerprint != make_folds(uneven, folds=4, seed=2).fingerprint
    for fold in range(4):
        assert split(uneven, read, fold) == split_by_patient(uneven, folds=4, held_out_fold=fold, seed=1)


def test_folds_of_other_data_are_refused_with_names(uneven: list[SlideRecord]) -> None:
    folds = make_folds(uneven, folds=4, seed=1)
    with pytest.raises(FoldsError, match="patient stranger of the data is not in the folds"):
        split([*uneven, *records({"stranger": "CE"})], folds, 0)
    without = [record for record in uneven if record.patient_id != "p7"]
    with pytest.raises(FoldsError, match="patient p7 of the folds is not in the data"):
        split(without, folds, 0)
    unusable = [record.image_id for record in uneven if record.patient_id == "p7"]
    assert split(without, folds, 0, unusable=unusable)
    with pytest.raises(FoldsError, match="p7 of the folds"):
        split(without, folds, 0, unusable=unusable[:-1])
    changed = [dataclasses.replace(record, label="LAA") for record in uneven]
    with pytest.raises(FoldsError, match="changed class"):
        split(changed, folds, 0)
    with pytest.raises(FoldsError, match=r"is not one of 0\.\.3"):
        split(uneven, folds, 4)


def test_a_patient_of_two_centres_cannot_be_left_out_by_centre() -> None:
    made = records({"a": "CE", "b": "LAA", "c": "CE", "d": "LAA"})
    made = [
        dataclasses.replace(record, center_id="1" if record.patient_id in "ab" else "2") for record in made
    ]
    assert leave_one_centre_out(made).fold_of_patient == {"a": 0, "b": 0, "c": 1, "d": 1}
    made[0] = dataclasses.replace(made[0], center_id="2")
    with pytest.raises(DataError, match="patient a has slides of centres 1, 2"):
        leave_one_centre_out(made)


def test_a_class_of_one_centre_cannot_be_learnt_without_it() -> None:
    made = records({"a": "CE", "b": "LAA", "c": "CE"})
    made = [dataclasses.replace(record, center_id=record.patient_id) for record in made]
    with pytest.raises(DataError, match="class LAA occurs at centre b only"):
        leave_one_centre_out(made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(format="x"), "is no folds file"),
        (lambda values: values.update(version=9), "version 9"),
        (lambda values: values.update(folds=1), "folds must be a whole number >= 2"),
        (lambda values: values.update(method="best"), "method 'best'"),
        (lambda values: values.update(patients={}), "at least one patient"),
        (lambda values: values["patients"]["p0"].update(fold=7), "patient p0: fold 7"),
        (lambda values: values["patients"]["p0"].pop("label"), "patient p0: label"),
        (lambda values: values["patients"]["p0"].update(image_ids=["p1_0"]), "belongs to patients p0 and p1"),
    ],
)
def test_a_damaged_file_is_named(
    uneven: list[SlideRecord], tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    values = make_folds(uneven, folds=4, seed=1).as_dict()
    change(values)
    (tmp_path / "folds.json").write_text(json.dumps(values))
    with pytest.raises(FoldsError, match=re.escape(message)):
        Folds.load(tmp_path / "folds.json")


def test_files_that_are_none() -> None:
    with pytest.raises(FoldsError, match="there is no such file"):
        Folds.load("nowhere.json")


def command(*arguments: str | Path) -> int:
    return main("python -m training", "", COMMANDS, ["folds", *map(str, arguments)])


def test_the_command_writes_folds_and_shows_them(
    uneven: list[SlideRecord], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{one.image_id},{one.center_id},{one.patient_id},{one.image_num},{one.label}" for one in uneven]
    (tmp_path / "train.csv").write_text("\n".join(["image_id,center_id,patient_id,image_num,label", *rows]))
    out = tmp_path / "folds.json"
    assert command("--data", tmp_path, "--folds", 4, "--seed", 1, "--out", out) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["fold", "patients", "slides", "CE", "LAA"]
    counts = np.array([line.split() for line in table[1:]], dtype=int)
    assert counts[:, 1].sum() == 24
    assert counts[:, 2].sum() == len(uneven)
    assert (counts[:, 3] + counts[:, 4] == counts[:, 1]).all()
    assert json.loads(last)["fingerprint"] == make_folds(uneven, folds=4, seed=1).fingerprint
    assert Folds.load(out) == make_folds(uneven, folds=4, seed=1)
    written = out.read_bytes()
    assert command("--labels", tmp_path / "train.csv", "--out", out) == 2
    assert "exists already" in capsys.readouterr().err
    assert command("--labels", tmp_path / "train.csv", "--by", "centre", "--out", tmp_path / "c.json") == 2
    assert "only one centre" in capsys.readouterr().err
    assert (
        command(
            "--labels", tmp_path / "train.csv", "--by", "centre", "--seed", 3, "--out", out, "--overwrite"
        )
        == 2
    )
    assert out.read_bytes() == written
    assert not (tmp_path / "c.json").exists()
