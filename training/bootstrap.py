"""How sure a score is: bootstrap intervals that resample patients, never slides of one patient apart."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training import calibration, scores

_VALUES_AT_ONCE = 4_000_000


def intervals(
    labels_N: Sequence[int],
    probabilities_NK: ArrayLike,
    patients_N: Sequence[str],
    *,
    fold_N: Sequence[int] | NDArray[np.integer] | None = None,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    within_class: bool = False,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of every score of `scores.SCORES`.

    Args:
        labels_N: class indices; rows are slides or patients.
        patients_N: whose row it is.
        fold_N: as in `scores.roc_auc`.
        level: share of the replicates between low and high.
        within_class: resample the patients of each class apart, so that every replicate has as many of it.

    Returns:
        score -> (low, high); replicates in which a score is not defined are left out, (NaN, NaN) if all are.
    """
    values = replicated(
        labels_N,
        probabilities_NK,
        patients_N,
        fold_N=fold_N,
        replicates=replicates,
        seed=seed,
        within_class=within_class,
    )
    tail = 100 * (1 - level) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # "All-NaN slice": the answer, NaN, is the right one
        return {
            name: (float(np.nanpercentile(of_score_R, tail)), float(np.nanpercentile(of_score_R, 100 - tail)))
            for name, of_score_R in values.items()
        }


def replicated(
    labels_N: Sequence[int],
    probabilities_NK: ArrayLike,
    patients_N: Sequence[str],
    *,
    fold_N: Sequence[int] | NDArray[np.integer] | None = None,
    replicates: int = 1000,
    seed: int = 0,
    within_class: bool = False,
) -> dict[str, NDArray[np.float64]]:
    """The scores of `replicates` resamples of the patients, float64 [R] each, NaN where not defined.

    A resample draws as many patients as there are, with replacement (Efron 1979); all rows of a patient come along
    as often as the patient was drawn.
    """
    labels = np.asarray(labels_N, dtype=np.intp)
    rows_NK = np.asarray(probabilities_NK, dtype=np.float64)
    if labels.size == 0:
        return {name: np.full(replicates, np.nan) for name in scores.SCORES}
    parts = [
        scores_of_weighted_rows(labels, rows_NK, weights_RN, fold_N)
        for weights_RN in _drawn(labels, patients_N, replicates, seed, within_class)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in scores.SCORES}


def _drawn(
    labels: NDArray[np.intp], patients_N: Sequence[str], replicates: int, seed: int, within_class: bool
) -> Iterator[NDArray[np.float64]]:
    """How often each row was drawn, in portions [<= replicates, N] of bounded memory."""
    _, first, patient_N = np.unique(np.asarray(patients_N), return_index=True, return_inverse=True)
    label_P = labels[first]
    strata = (
        [np.flatnonzero(label_P == k) for k in np.unique(label_P)]
        if within_class
        else [np.arange(first.size)]
    )
    generator = np.random.default_rng(seed)
    portion = max(1, _VALUES_AT_ONCE // labels.size)
    for start in range(0, replicates, portion):
        size = min(portion, replicates - start)
        counts_RP = np.zeros((size, first.size))
        for members in strata:
            counts_RP[:, members] = generator.multinomial(
                members.size, np.full(members.size, 1 / members.size), size
            )
        yield counts_RP[:, patient_N]


def scores_of_weighted_rows(
    labels: NDArray[np.intp],
    rows_NK: NDArray[np.float64],
    weights_RN: NDArray[np.float64],
    fold_N: Sequence[int] | NDArray[np.integer] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Every score of `scores.SCORES` of the same rows under R sets of weights at once, float64 [R] each.

    A weight of n counts as n equal rows. With all weights 1 the values are those of `scores.all_scores`.
    """
    classes = rows_NK.shape[1]
    truth_NK = np.eye(classes)[labels]
    right_N = rows_NK.argmax(axis=1) == labels
    clipped_NK = np.clip(
        rows_NK / rows_NK.sum(axis=1, keepdims=True),
        scores.SMALLEST_PROBABILITY,
        1 - scores.SMALLEST_PROBABILITY,
    )
    total_R = weights_RN.sum(axis=1)
    of_class_RK = weights_RN @ truth_NK
    distance_N = scores.brier_scale(classes) * ((rows_NK - truth_NK) ** 2).sum(axis=1)
    index_N = calibration.bin_of(rows_NK.max(axis=1), calibration.BINS)
    gap_NB = np.eye(calibration.BINS)[index_N] * (right_N - rows_NK.max(axis=1))[:, None]
    folds = np.zeros(labels.size, dtype=np.intp) if fold_N is None else np.asarray(fold_N)

    def roc_auc(
        positive_N: NDArray[np.bool_], value_N: NDArray[np.float64], weights_RN: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        parts = [
            _ordered_pairs(positive_N[inside], value_N[inside], weights_RN[:, inside])
            for inside in (folds == fold for fold in np.unique(folds))
        ]
        ordered_R, pairs_R = np.sum(parts, axis=0)
        return ordered_R / pairs_R

    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "roc_auc": _over_classes(roc_auc, labels, rows_NK, weights_RN, of_class_RK),
            "pr_auc": _over_classes(_average_precision, labels, rows_NK, weights_RN, of_class_RK),
            "weighted_log_loss": _mean_of_occurring(
                weights_RN @ (-np.log(clipped_NK) * truth_NK), of_class_RK
            ),
            "accuracy": weights_RN @ right_N / total_R,
            "balanced_accuracy": _mean_of_occurring(weights_RN @ (truth_NK * right_N[:, None]), of_class_RK),
            "brier": weights_RN @ distance_N / total_R,
            "expected_calibration_error": np.abs(weights_RN @ gap_NB).sum(axis=1) / total_R,
        }


def _mean_of_occurring(sum_RK: NDArray[np.float64], of_class_RK: NDArray[np.float64]) -> NDArray[np.float64]:
    occurs_RK = of_class_RK > 0
    mean_RK = np.divide(sum_RK, of_class_RK, out=np.zeros_like(sum_RK), where=occurs_RK)
    return mean_RK.sum(axis=1) / occurs_RK.sum(axis=1)


def _over_classes(
    area: Callable[[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
    labels: NDArray[np.intp],
    rows_NK: NDArray[np.float64],
    weights_RN: NDArray[np.float64],
    of_class_RK: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Mean of `area` over the classes that `scores.ranked_classes` names, those that a replicate lacks left out."""
    chosen = scores.ranked_classes(labels, rows_NK.shape[1])
    if not chosen:
        return np.full(len(weights_RN), np.nan)
    values_RC = np.stack([area(labels == k, rows_NK[:, k], weights_RN) for k in chosen], axis=1)
    defined_RC = np.isfinite(values_RC) & ((of_class_RK > 0).sum(axis=1) > 1)[:, None]
    return np.where(defined_RC, values_RC, 0.0).sum(axis=1) / defined_RC.sum(axis=1)


def _ordered_pairs(
    positive_N: NDArray[np.bool_], value_N: NDArray[np.float64], weights_RN: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pairs in which the positive has the larger value (equal values count half), and all pairs: two float64 [R]."""
    positive_RG, negative_RG = _by_falling_value(positive_N, value_N, weights_RN)
    above_RG = np.cumsum(positive_RG, axis=1) - positive_RG
    return (
        ((above_RG + 0.5 * positive_RG) * negative_RG).sum(axis=1),
        positive_RG.sum(axis=1) * negative_RG.sum(axis=1),
    )


def _average_precision(
    positive_N: NDArray[np.bool_], value_N: NDArray[np.float64], weights_RN: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Sum over thresholds of precision times the growth of recall, as scikit-learn's average_precision_score."""
    positive_RG, negative_RG = _by_falling_value(positive_N, value_N, weights_RN)
    found_RG = np.cumsum(positive_RG, axis=1)
    taken_RG = found_RG + np.cumsum(negative_RG, axis=1)
    precision_RG = np.divide(found_RG, taken_RG, out=np.zeros_like(found_RG), where=taken_RG > 0)
    return (precision_RG * positive_RG).sum(axis=1) / positive_RG.sum(axis=1)


def _by_falling_value(
    positive_N: NDArray[np.bool_], value_N: NDArray[np.float64], weights_RN: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights of positives and of negatives at each distinct value, the largest first: two float64 [R, G]."""
    order = np.argsort(-value_N, kind="stable")
    starts = np.flatnonzero(np.diff(value_N[order], prepend=np.inf) != 0)
    sorted_RN = weights_RN[:, order]
    positive = positive_N[order]
    return (
        np.add.reduceat(sorted_RN * positive, starts, axis=1),
        np.add.reduceat(sorted_RN * ~positive, starts, axis=1),
    )
