"""How good answers are: by tile, by slide, by patient.

Labels are class indices, `probabilities_NK` are rows of K probabilities. A score that is not defined for the rows at
hand (an area under a curve where one class alone occurs) is NaN here and null in JSON (`finite_or_none`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from slides.aggregate import mean_probabilities, slides_to_patients
from slides.labels import SlideRecord
from training.calibration import expected_calibration_error

SMALLEST_PROBABILITY = 1e-15
"""The competition's log loss clips probabilities to it and to one minus it."""

SCORES = (
    "roc_auc",
    "pr_auc",
    "weighted_log_loss",
    "accuracy",
    "balanced_accuracy",
    "brier",
    "expected_calibration_error",
)


def by_slide(
    probabilities_NK: NDArray[np.float32], slide_of_tile: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    """image_id -> mean probabilities [K] of its tiles; row n of `probabilities_NK` belongs to slide_of_tile[n]."""
    rows_of: dict[str, list[int]] = {}
    for row, image_id in enumerate(slide_of_tile):
        rows_of.setdefault(image_id, []).append(row)
    return {image_id: mean_probabilities(probabilities_NK[rows]) for image_id, rows in rows_of.items()}


def roc_auc(
    labels_N: Sequence[int],
    probabilities_NK: NDArray[np.float64],
    fold_N: Sequence[int] | NDArray[np.integer] | None = None,
) -> float:
    """Area under the ROC curve: the share of pairs (one of the class, one not) that are in the right order.

    Args:
        fold_N: where answers of different folds come from different fits, pairs are taken within folds only (the mean of
            the folds' areas, weighted by their pairs). Pairs across folds compare answers of two fits, one of which
            was fitted on the other's row; of pure noise they come out below 0.5 (Forman and Scholz 2010; Parker,
            Günter and Bedo 2007).

    Returns:
        0..1; for K > 2 the mean of one class against the rest, over classes that occur. NaN where fewer than two
        classes occur, or in no fold.
    """
    labels = np.asarray(labels_N)
    folds = np.zeros(labels.size, dtype=np.intp) if fold_N is None else np.asarray(fold_N)
    values = [
        _area_within_folds(labels == k, probabilities_NK[:, k], folds)
        for k in ranked_classes(labels, probabilities_NK.shape[1])
    ]
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")


def _area_within_folds(
    positive_N: NDArray[np.bool_], value_N: NDArray[np.float64], fold_N: NDArray[np.integer]
) -> float:
    from sklearn.metrics import roc_auc_score  # it takes seconds to import, and few need it

    ordered = pairs = 0.0
    for fold in np.unique(fold_N):
        inside = fold_N == fold
        positives = int(positive_N[inside].sum())
        of_fold = positives * (int(inside.sum()) - positives)
        if of_fold:
            ordered += of_fold * roc_auc_score(positive_N[inside], value_N[inside])
            pairs += of_fold
    return ordered / pairs if pairs else float("nan")


def pr_auc(labels_N: Sequence[int], probabilities_NK: NDArray[np.float64]) -> float:
    """Area under the precision-recall curve as average precision (no interpolation).

    Of the second class where K = 2; for K > 2 the mean of one class against the rest, over classes that occur.

    Returns:
        0..1, or NaN where fewer than two classes occur. A guess has the share of the class, not 0.5.
    """
    from sklearn.metrics import average_precision_score  # it takes seconds to import, and few need it

    labels = np.asarray(labels_N)
    classes = ranked_classes(labels, probabilities_NK.shape[1])
    values = [average_precision_score(labels == k, probabilities_NK[:, k]) for k in classes]
    return float(np.mean(values)) if values else float("nan")


def weighted_log_loss(
    labels_N: Sequence[int],
    probabilities_NK: NDArray[np.float64],
    class_weights_K: Sequence[float] | None = None,
) -> float:
    """Weighted multi-class log loss as the STRIP AI competition defines it.

        loss = - sum_k w_k mean_{n of class k} ln p_nk / sum_k w_k

    with k over the classes that occur. Rows are divided by their sum, then clipped to 1e-15 .. 1 - 1e-15, as the
    competition's evaluation page has it; it scores patients, with equal weights.

    Args:
        class_weights_K: w, >= 0; None for equal weights.

    Returns:
        >= 0; a constant answer of 1/K has ln K. NaN without rows, or where the classes that occur weigh 0.
    """
    labels = np.asarray(labels_N)
    rows_NK = probabilities_NK / probabilities_NK.sum(axis=1, keepdims=True)
    of_truth_N = np.clip(
        rows_NK[np.arange(labels.size), labels], SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY
    )
    classes = np.unique(labels)
    weights = np.ones(classes.size) if class_weights_K is None else np.asarray(class_weights_K)[classes]
    losses = np.array([-np.log(of_truth_N[labels == k]).mean() for k in classes])
    total = weights.sum()
    return float(weights @ losses / total) if total > 0 else float("nan")


def accuracy(labels_N: Sequence[int], probabilities_NK: NDArray[np.floating]) -> float:
    """Share of rows whose most probable class is the true one."""
    return float(np.mean(probabilities_NK.argmax(axis=1) == np.asarray(labels_N)))


def balanced_accuracy(labels_N: Sequence[int], probabilities_NK: NDArray[np.floating]) -> float:
    """Mean, over the classes that occur, of the share of their rows that is answered right.

    As scikit-learn's balanced_accuracy_score, which warns where an answer is of a class that does not occur.
    """
    labels = np.asarray(labels_N)
    right_N = probabilities_NK.argmax(axis=1) == labels
    return float(np.mean([right_N[labels == k].mean() for k in np.unique(labels)]))


def brier(labels_N: Sequence[int], probabilities_NK: NDArray[np.float64]) -> float:
    """Mean squared distance from the truth (Brier 1950), halved where K = 2, as scikit-learn has it.

    Returns:
        0..1 for K = 2 (a constant 0.5 has 0.25), 0..2 for more classes.
    """
    truth_NK = np.eye(probabilities_NK.shape[1])[np.asarray(labels_N)]
    return brier_scale(probabilities_NK.shape[1]) * float(
        ((probabilities_NK - truth_NK) ** 2).sum(axis=1).mean()
    )


def brier_scale(classes: int) -> float:
    """What the sum over classes of squared distances is multiplied by."""
    return 0.5 if classes == 2 else 1.0


def ranked_classes(labels_N: NDArray[np.integer], classes: int) -> list[int]:
    """The classes that areas under curves are averaged over: none, the second of two, or all that occur."""
    occurring = np.unique(labels_N)
    if occurring.size < 2:
        return []
    return [1] if classes == 2 else occurring.tolist()


def all_scores(
    labels_N: Sequence[int],
    probabilities_NK: NDArray[np.float64],
    fold_N: Sequence[int] | NDArray[np.integer] | None = None,
) -> dict[str, float]:
    """Every score of SCORES by its name, NaN where it is not defined; all NaN without rows. `fold_N`: see roc_auc."""
    if len(labels_N) == 0:
        return dict.fromkeys(SCORES, float("nan"))
    values = (
        roc_auc(labels_N, probabilities_NK, fold_N),
        pr_auc(labels_N, probabilities_NK),
        weighted_log_loss(labels_N, probabilities_NK),
        accuracy(labels_N, probabilities_NK),
        balanced_accuracy(labels_N, probabilities_NK),
        brier(labels_N, probabilities_NK),
        expected_calibration_error(labels_N, probabilities_NK),
    )
    return dict(zip(SCORES, values, strict=True))


def finite_or_none(values: Mapping[str, float], digits: int | None = None) -> dict[str, float | None]:
    """For JSON: what is not a finite number becomes None, the rest is rounded to `digits` places if given."""
    return {
        name: (value if digits is None else round(value, digits)) if math.isfinite(value) else None
        for name, value in values.items()
    }


def score_levels(
    of_slide: Mapping[str, NDArray[np.float64]], records: Sequence[SlideRecord], class_names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """All scores of slides and of patients (mean over a patient's slides).

    Args:
        of_slide: image_id -> probabilities [K].
        records: at least the slides of `of_slide`.

    Returns:
        {"slide": {score: value}, "patient": {score: value}} with the names of SCORES.
    """
    index_of = {name: index for index, name in enumerate(class_names)}
    label_of_slide = {record.image_id: index_of[record.label] for record in records}
    label_of_patient = {record.patient_id: index_of[record.label] for record in records}
    of_patient = slides_to_patients(of_slide, {record.image_id: record.patient_id for record in records})
    return {
        "slide": all_scores([label_of_slide[key] for key in of_slide], np.stack(list(of_slide.values()))),
        "patient": all_scores(
            [label_of_patient[key] for key in of_patient], np.stack(list(of_patient.values()))
        ),
    }


def score(
    probabilities_NK: NDArray[np.float32],
    slide_of_tile: Sequence[str],
    records: Sequence[SlideRecord],
    class_names: Sequence[str],
) -> dict[str, float]:
    """The scores of held-out tiles that a training run reports.

    Args:
        probabilities_NK: FP32 [N, K], one row a tile.
        slide_of_tile: image_id of each row.
        records: the slides that the tiles come from.

    Returns:
        tile_accuracy, and accuracy, auc and log_loss for slide_ and patient_.
    """
    index_of = {name: index for index, name in enumerate(class_names)}
    label_of_slide = {record.image_id: index_of[record.label] for record in records}
    levels = score_levels(by_slide(probabilities_NK, slide_of_tile), records, class_names)
    told = {
        "tile_accuracy": accuracy([label_of_slide[image_id] for image_id in slide_of_tile], probabilities_NK)
    }
    for level, values in levels.items():
        told[f"{level}_accuracy"] = values["accuracy"]
        told[f"{level}_auc"] = values["roc_auc"]
        told[f"{level}_log_loss"] = values["weighted_log_loss"]
    return told
