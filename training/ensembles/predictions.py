"""The table of an ensemble's answers: one row a slide, with what is said of its patient beside it."""

from __future__ import annotations

import csv
import io

import numpy as np
from numpy.typing import NDArray

from training.ensembles import conformal, uncertainty
from training.ensembles.assessment import Assessment
from training.ensembles.tables import Members


def as_csv(assessment: Assessment, members: Members, weights_M: NDArray[np.float64]) -> str:
    """The table as text; it can be given to `ensemble --oof` again.

    Columns: image_id, patient_id, center_id, label, then for the slide p_<class>..., predicted, entropy,
    mutual_information, std, with abstention also answered (1 or 0); then the same for the patient, each name with
    patient_ before it.
    """
    of_patient = members.by_patient(members.probabilities_MNK)
    levels = (
        ("", assessment.answers_NK, members.probabilities_MNK, assessment.thresholds_N(members)),
        ("patient_", assessment.patient_answers_PK, of_patient, assessment.thresholds_P),
    )
    header = ["image_id", "patient_id", "center_id", "label"]
    columns: list[tuple[bool, list[str]]] = []
    for prefix, answers_NK, values_MNK, thresholds in levels:
        told = uncertainty.of_members(values_MNK, weights_M, answers_NK)
        parts = {f"p_{name}": _texts(answers_NK[:, k]) for k, name in enumerate(members.class_names)}
        parts["predicted"] = [members.class_names[k] for k in answers_NK.argmax(axis=1)]
        parts["entropy"] = _texts(told.entropy_N)
        parts["mutual_information"] = _texts(told.mutual_information_N)
        parts["std"] = _texts(told.std_N)
        if thresholds is not None:
            parts["answered"] = [str(int(one)) for one in conformal.answered(answers_NK, thresholds)]
        header += [prefix + name for name in parts]
        columns += [(bool(prefix), column) for column in parts.values()]
    patient_N = np.unique(members.patients_N, return_inverse=True)[1].tolist()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row, record in enumerate(members.records):
        writer.writerow(
            [
                record.image_id,
                record.patient_id,
                record.center_id,
                record.label,
                *(column[patient_N[row] if of_patient_too else row] for of_patient_too, column in columns),
            ]
        )
    return text.getvalue()


def _texts(values_N: NDArray[np.float64]) -> list[str]:
    return [f"{value:.9g}" for value in values_N.tolist()]
