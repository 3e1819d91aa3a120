"""training/split.py"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from slides.labels import SlideRecord
from training.errors import DataError
from training.split import split_by_patient


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
