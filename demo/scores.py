"""Scores of the served answers on held-out patients."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from slides.aggregate import slides_to_patients
from training.scores import roc_auc


@dataclasses.dataclass(frozen=True)
class Scored:
    """One image or patient: what is true and what was answered.

    Attributes:
        probabilities: class name -> 0..1.
    """

    name: str
    truth: str
    label: str
    probabilities: Mapping[str, float]

    @property
    def right(self) -> bool:
        return self.label == self.truth


def scored(name: str, truth: str, probabilities: Mapping[str, float]) -> Scored:
    """The label is the class with the highest probability, of equals the first."""
    return Scored(
        name, truth, max(probabilities, key=lambda label: probabilities[label]), dict(probabilities)
    )


def by_patient(images: Sequence[Scored], patient_of_image: Mapping[str, str]) -> list[Scored]:
    """Patients: the mean over their images, in the order of first appearance."""
    truths = {patient_of_image[image.name]: image.truth for image in images}
    means = slides_to_patients(
        {image.name: [*image.probabilities.values()] for image in images}, patient_of_image
    )
    names = [*images[0].probabilities] if images else []
    return [
        scored(patient, truths[patient], dict(zip(names, map(float, mean_K), strict=True)))
        for patient, mean_K in means.items()
    ]


def auc(rows: Sequence[Scored]) -> float | None:
    """ROC AUC as `training.scores.roc_auc` computes it; None where only one class occurs, since it is not
    defined."""
    if len({row.truth for row in rows}) < 2:
        return None
    class_names = [*rows[0].probabilities]
    labels_N = [class_names.index(row.truth) for row in rows]
    return roc_auc(labels_N, np.array([[*row.probabilities.values()] for row in rows]))


def accuracy(rows: Sequence[Scored]) -> float | None:
    """Share of right labels; None without rows."""
    return sum(row.right for row in rows) / len(rows) if rows else None
