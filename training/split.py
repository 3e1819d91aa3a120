"""Folds that never share a patient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from slides.labels import SlideRecord
from training.errors import DataError


def split_by_patient(
    records: Sequence[SlideRecord], *, folds: int, held_out_fold: int, seed: int
) -> tuple[list[SlideRecord], list[SlideRecord]]:
    """Deal patients into folds, classes as evenly as whole patients allow, and hold one fold out.

    Args:
        records: every slide, or every tile where tiles come ready cut.
        folds: number of folds, >= 2.
        held_out_fold: 0..folds-1.
        seed: the same seed and records give the same folds, whatever the order of the records.

    Returns:
        (records to train on, held-out records), each sorted by image_id; no patient is in both.

    Raises:
        DataError: a class has fewer patients than there are folds, so that some fold would miss it.
    """
    ordered = sorted(records, key=lambda record: record.image_id)
    patients_of: dict[str, set[str]] = {}
    for record in ordered:
        patients_of.setdefault(record.label, set()).add(record.patient_id)
    problems = [
        f"class {label} has {len(patients)} patient{'s' if len(patients) != 1 else ''}, fewer than {folds} folds; "
        "lower folds in the recipe or add patients"
        for label, patients in sorted(patients_of.items())
        if len(patients) < folds
    ]
    if len(patients_of) < 2:
        problems.append(f"there is only one class: {', '.join(patients_of) or 'no slide at all'}")
    if problems:
        raise DataError(f"split of {len(ordered)} records by patient", problems)
    labels = np.array([record.label for record in ordered])
    groups = np.array([record.patient_id for record in ordered])
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    train_rows, held_out_rows = list(splitter.split(labels, labels, groups))[held_out_fold]
    train, held_out = [ordered[row] for row in train_rows], [ordered[row] for row in held_out_rows]
    missing = sorted(set(patients_of) - {record.label for record in held_out})
    if missing:
        raise DataError(
            f"held-out fold {held_out_fold} of {folds}",
            [
                f"no patient of class {label}; take another seed, held_out_fold or number of folds"
                for label in missing
            ],
        )
    return train, held_out
