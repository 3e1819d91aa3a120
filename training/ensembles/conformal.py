"""When to say nothing: abstention by split-conformal prediction sets (Angelopoulos and Bates 2021, section 1).

The set of a patient holds every class k with 1 - p_k <= threshold. The threshold is the ceil((n + 1)(1 - alpha))-th
smallest of 1 - p_true over n calibration patients. For a further patient, exchangeable with those, the set holds the true
class with probability >= 1 - alpha (and <= 1 - alpha + 1/(n + 1) without ties). The answer is given where the set holds
exactly one class; with two or more, or none, the ensemble abstains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.scores import accuracy

SLACK = 1e-9
"""Added to the threshold where it is compared, so that the row that defined it stays inside whatever is rounded."""


def fit_threshold(labels_N: Sequence[int], probabilities_NK: ArrayLike, alpha: float) -> float:
    """The threshold from calibration patients, one row each.

    Args:
        alpha: 0 < alpha < 1, the share of patients whose set may miss the truth.

    Returns:
        0..1; 1.0, at which every set holds every class, where n is too small for alpha (n < 1/alpha - 1).
    """
    rows_NK = np.asarray(probabilities_NK, dtype=np.float64)
    scores_N = np.sort(1 - rows_NK[np.arange(len(rows_NK)), np.asarray(labels_N, dtype=np.intp)])
    rank = math.ceil(
        (scores_N.size + 1) * (1 - alpha) - 1e-9
    )  # (n + 1)(1 - alpha) is a whole number in exact terms
    return float(scores_N[rank - 1]) if rank <= scores_N.size else 1.0


def prediction_sets(probabilities_NK: ArrayLike, threshold: float | ArrayLike) -> NDArray[np.bool_]:
    """Which classes the set of each row holds, bool [N, K]; `threshold` is one number or one a row."""
    limits = np.asarray(threshold, dtype=np.float64)
    return 1 - np.asarray(probabilities_NK, dtype=np.float64) <= np.atleast_1d(limits)[:, None] + SLACK


def answered(probabilities_NK: ArrayLike, threshold: float | ArrayLike) -> NDArray[np.bool_]:
    """Which rows are answered: those whose set holds exactly one class, bool [N]."""
    return prediction_sets(probabilities_NK, threshold).sum(axis=1) == 1


def selective_scores(
    labels_N: Sequence[int], probabilities_NK: NDArray[np.float64], threshold: float | ArrayLike
) -> dict[str, float]:
    """What abstention gives and costs.

    Returns:
        answered: share of rows that get an answer; accuracy_of_answered: share of those that is right, NaN if there
        are none; coverage: share of rows whose set holds the truth; balanced_coverage: its mean over the classes that
        occur (the guarantee is for all rows together, a rare class may have less).
    """
    labels = np.asarray(labels_N, dtype=np.intp)
    sets_NK = prediction_sets(probabilities_NK, threshold)
    taken_N = sets_NK.sum(axis=1) == 1
    covered_N = sets_NK[np.arange(labels.size), labels]
    return {
        "answered": float(taken_N.mean()),
        "accuracy_of_answered": accuracy(labels[taken_N].tolist(), probabilities_NK[taken_N])
        if taken_N.any()
        else float("nan"),
        "coverage": float(covered_N.mean()),
        "balanced_coverage": float(np.mean([covered_N[labels == k].mean() for k in np.unique(labels)])),
    }
