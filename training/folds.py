"""Folds that never share a patient: stratified by class, or one fold a centre; kept in one JSON file.

    folds = make_folds(records, folds=5, seed=0)
    folds.save(Path("folds.json"))
    train, held_out = split(records, Folds.load(Path("folds.json")), held_out_fold=2)

The file names every patient with class, centre and slides, so that folds of other data are refused with names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from slides.labels import SlideRecord
from training.errors import DataError, FoldsError
from training.folds_file import BY_CENTRE, STRATIFIED, Folds, Patient, labels_of_patients

__all__ = ["Folds", "Patient", "deal_rows", "leave_one_centre_out", "make_folds", "split", "split_by_patient"]


def make_folds(records: Sequence[SlideRecord], *, folds: int, seed: int) -> Folds:
    """Deal patients into folds, classes as evenly as whole patients allow.

    Args:
        records: every slide, or every tile where tiles come ready cut.
        folds: >= 2.
        seed: the same seed and records give the same folds, whatever the order of the records.

    Raises:
        DataError: a class has fewer patients than there are folds, a patient has two classes, there is one class
            only, or a fold came out without a patient of some class.
    """
    dealt = _deal(records, folds, seed)
    problems = [
        f"fold {fold} has no patient of class {label}; take another seed or fewer folds"
        for fold in range(folds)
        for label in dealt.class_names
        if not any(patient.fold == fold and patient.label == label for patient in dealt.patients.values())
    ]
    if problems:
        raise DataError(f"{folds} folds of {len(dealt.patients)} patients", problems)
    return dealt


def leave_one_centre_out(records: Sequence[SlideRecord]) -> Folds:
    """One fold a centre, in order of center_id (numbers by value): how a network does where it never was.

    A centre may hold patients of one class only; ranking scores of that fold are then undefined.

    Raises:
        DataError: one centre only, a patient with slides of two centres (whichever fold took the patient, the other
            centre would be on both sides), a patient with two classes, or a class seen at one centre only.
    """
    patients = _patients(records, {})
    centres = tuple(sorted({record.center_id for record in records}, key=_by_value))
    problems = [
        f"patient {patient_id} has slides of centres {', '.join(patient.center_ids)}: one of them would be trained on "
        "and tested on; give the patient one centre in train.csv, or leave the patient out"
        for patient_id, patient in patients.items()
        if len(patient.center_ids) > 1
    ]
    if len(centres) < 2:
        problems.append(f"there is only one centre: {', '.join(centres) or 'no slide at all'}")
    labels = {patient.label for patient in patients.values()}
    if len(labels) < 2:
        problems.append(f"there is only one class: {', '.join(labels) or 'no slide at all'}")
    for label in sorted(labels) if len(labels) > 1 else ():
        where = {
            center for patient in patients.values() if patient.label == label for center in patient.center_ids
        }
        if len(where) == 1 and len(centres) > 1:
            problems.append(
                f"class {label} occurs at centre {where.pop()} only; without it nobody can learn {label}"
            )
    if problems:
        raise DataError(f"folds by centre of {len(records)} records", problems)
    fold_of = {center: fold for fold, center in enumerate(centres)}
    dealt = {
        patient_id: dataclasses.replace(patient, fold=fold_of[patient.center_ids[0]])
        for patient_id, patient in patients.items()
    }
    return Folds(BY_CENTRE, len(centres), None, dealt, centres)


def split(
    records: Sequence[SlideRecord], folds: Folds, held_out_fold: int, *, unusable: Collection[str] = ()
) -> tuple[list[SlideRecord], list[SlideRecord]]:
    """Hold one fold out.

    Args:
        held_out_fold: 0..folds.folds-1.
        unusable: image_ids that are missing from `records` because they could not be read.

    Returns:
        (records to train on, held-out records), each sorted by image_id; no patient is in both.

    Raises:
        FoldsError: there is no such fold, or the folds are of other data.
        DataError: nothing is held out, or a class is missing on one side (of a held-out centre it may be).
    """
    if not 0 <= held_out_fold < folds.folds:
        raise FoldsError("held-out fold", [f"{held_out_fold} is not one of 0..{folds.folds - 1}"])
    folds.check(records, unusable=unusable)
    ordered = sorted(records, key=lambda record: record.image_id)
    fold_of = folds.fold_of_patient
    train = [record for record in ordered if fold_of[record.patient_id] != held_out_fold]
    held_out = [record for record in ordered if fold_of[record.patient_id] == held_out_fold]
    labels = {record.label for record in ordered}
    centre = f" (centre {folds.centres[held_out_fold]})" if folds.centres else ""
    problems = [
        f"no patient of class {label} is left to train on"
        for label in sorted(labels - {record.label for record in train})
    ]
    if folds.method == STRATIFIED:
        problems += [
            f"no patient of class {label}; take another seed, held_out_fold or number of folds"
            for label in sorted(labels - {record.label for record in held_out})
        ]
    elif not held_out:
        problems.append("none of its slides can be used")
    if problems:
        raise DataError(f"held-out fold {held_out_fold} of {folds.folds}{centre}", problems)
    return train, held_out


def split_by_patient(
    records: Sequence[SlideRecord], *, folds: int, held_out_fold: int, seed: int
) -> tuple[list[SlideRecord], list[SlideRecord]]:
    """`split` by the folds that `make_folds` gives, without a file; only the held-out fold must have all classes.

    Raises:
        DataError: a class has fewer patients than there are folds, so that some fold would miss it.
        FoldsError: held_out_fold is not one of 0..folds-1.
    """
    return split(records, _deal(records, folds, seed), held_out_fold)


def deal_rows(
    labels_N: Sequence[str] | NDArray[np.integer],
    patients_N: Sequence[str] | NDArray[np.str_],
    *,
    folds: int,
    seed: int,
) -> NDArray[np.intp]:
    """The fold 0..folds-1 of each row, by scikit-learn's StratifiedGroupKFold; rows of a patient share a fold.

    The deal depends on the order of the rows. Each class must have at least `folds` rows.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # it takes seconds to import, and few need it

    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    fold_N = np.empty(len(labels_N), dtype=np.intp)
    for fold, (_, rows) in enumerate(splitter.split(labels_N, labels_N, patients_N)):
        fold_N[rows] = fold
    return fold_N


def _deal(records: Sequence[SlideRecord], folds: int, seed: int) -> Folds:
    if folds < 2:
        raise DataError("folds", [f"{folds} is not enough; at least 2 are needed"])
    ordered = sorted(records, key=lambda record: record.image_id)
    patients = _patients(ordered, {})
    labels = sorted({patient.label for patient in patients.values()})
    counts = {label: sum(patient.label == label for patient in patients.values()) for label in labels}
    problems = [
        f"class {label} has {count} patient{'s' if count != 1 else ''}, fewer than {folds} folds; "
        "lower folds in the recipe or add patients"
        for label, count in counts.items()
        if count < folds
    ]
    if len(labels) < 2:
        problems.append(f"there is only one class: {', '.join(labels) or 'no slide at all'}")
    if problems:
        raise DataError(f"split of {len(ordered)} records by patient", problems)
    patient_N = [record.patient_id for record in ordered]
    fold_N = deal_rows([record.label for record in ordered], patient_N, folds=folds, seed=seed)
    fold_of = dict(zip(patient_N, fold_N.tolist(), strict=True))
    return Folds(STRATIFIED, folds, seed, _patients(ordered, fold_of))


def _patients(records: Iterable[SlideRecord], fold_of: Mapping[str, int]) -> dict[str, Patient]:
    label_of = labels_of_patients(records := list(records))
    centers: dict[str, set[str]] = {}
    images: dict[str, list[str]] = {}
    for record in records:
        centers.setdefault(record.patient_id, set()).add(record.center_id)
        images.setdefault(record.patient_id, []).append(record.image_id)
    return {
        key: Patient(
            fold_of.get(key, 0), label_of[key], tuple(sorted(centers[key])), tuple(sorted(images[key]))
        )
        for key in sorted(label_of)
    }


def _by_value(center_id: str) -> tuple[int, int, str]:
    return (0, int(center_id), center_id) if center_id.isdecimal() else (1, 0, center_id)
