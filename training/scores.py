"""How good the held-out answers are: by tile, by slide, by patient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from slides.aggregate import mean_probabilities, slides_to_patients
from slides.labels import SlideRecord

SMALLEST_PROBABILITY = 1e-15
"""The competition's log loss clips probabilities to it and to one minus it."""


def by_slide(
    probabilities_NK: NDArray[np.float32], slide_of_tile: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    """image_id -> mean probabilities [K] of its tiles; row n of `probabilities_NK` belongs to slide_of_tile[n]."""
    rows_of: dict[str, list[int]] = {}
    for row, image_id in enumerate(slide_of_tile):
        rows_of.setdefault(image_id, []).append(row)
    return {image_id: mean_probabilities(probabilities_NK[rows]) for image_id, rows in rows_of.items()}


def roc_auc(labels_N: Sequence[int], probabilities_NK: NDArray[np.float64]) -> float:
    """Area under the ROC curve; for K > 2 the mean of one class against the rest, over classes that occur.

    Returns:
        0..1, or NaN where fewer than two classes occur.
    """
    labels = np.asarray(labels_N)
    occurring = np.unique(labels)
    if occurring.size < 2:
        return float("nan")
    classes = [1] if probabilities_NK.shape[1] == 2 else occurring.tolist()
    return float(np.mean([roc_auc_score(labels == k, probabilities_NK[:, k]) for k in classes]))


def weighted_log_loss(labels_N: Sequence[int], probabilities_NK: NDArray[np.float64]) -> float:
    """Log loss in which every class that occurs weighs the same (STRIP AI's metric, equal weights).

    Rows are divided by their sum, then clipped, as the competition's evaluation page has it.
    """
    labels = np.asarray(labels_N)
    rows_NK = probabilities_NK / probabilities_NK.sum(axis=1, keepdims=True)
    of_truth_N = np.clip(
        rows_NK[np.arange(labels.size), labels], SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY
    )
    return float(np.mean([-np.log(of_truth_N[labels == k]).mean() for k in np.unique(labels)]))


def accuracy(labels_N: Sequence[int], probabilities_NK: NDArray[np.floating]) -> float:
    """Share of rows whose most probable class is the true one."""
    return float(np.mean(probabilities_NK.argmax(axis=1) == np.asarray(labels_N)))


def score(
    probabilities_NK: NDArray[np.float32],
    slide_of_tile: Sequence[str],
    records: Sequence[SlideRecord],
    class_names: Sequence[str],
) -> dict[str, float]:
    """All scores of held-out tiles.

    Args:
        probabilities_NK: FP32 [N, K], one row a tile.
        slide_of_tile: image_id of each row.
        records: the slides that the tiles come from.

    Returns:
        tile_accuracy, and accuracy, auc and log_loss for slide_ and patient_.
    """
    index_of = {name: index for index, name in enumerate(class_names)}
    label_of_slide = {record.image_id: index_of[record.label] for record in records}
    patient_of_slide = {record.image_id: record.patient_id for record in records}
    label_of_patient = {record.patient_id: index_of[record.label] for record in records}
    of_slide = by_slide(probabilities_NK, slide_of_tile)
    of_patient = slides_to_patients(of_slide, patient_of_slide)
    scores = {
        "tile_accuracy": accuracy([label_of_slide[image_id] for image_id in slide_of_tile], probabilities_NK)
    }
    levels: tuple[tuple[str, Mapping[str, NDArray[np.float64]], Mapping[str, int]], ...] = (
        ("slide", of_slide, label_of_slide),
        ("patient", of_patient, label_of_patient),
    )
    for level, probabilities, label_of in levels:
        labels = [label_of[key] for key in probabilities]
        rows_NK = np.stack(list(probabilities.values()))
        scores[f"{level}_accuracy"] = accuracy(labels, rows_NK)
        scores[f"{level}_auc"] = roc_auc(labels, rows_NK)
        scores[f"{level}_log_loss"] = weighted_log_loss(labels, rows_NK)
    return scores
