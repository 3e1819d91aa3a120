"""Does a probability of 0.8 come true eight times in ten? Reliability bins, calibration error, temperature."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

BINS = 15
SMALLEST_PROBABILITY = 1e-6
"""Probabilities are clipped to it before their logarithm is taken; FP32 softmax tells no smaller ones apart from 0."""
_LOG_TEMPERATURES = (-3.0, 3.0)


@dataclasses.dataclass(frozen=True)
class Bin:
    """Answers whose confidence lies in (low, high], the first bin with its lower edge.

    Attributes:
        count: how many.
        confidence: their mean confidence; NaN where count is 0.
        accuracy: the share of them that is right; NaN where count is 0.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def bin_of(confidence_N: NDArray[np.floating], bins: int) -> NDArray[np.intp]:
    """Index 0..bins-1 of the bin of equal width that each confidence in 0..1 falls into."""
    return np.clip(np.ceil(confidence_N * bins).astype(np.intp) - 1, 0, bins - 1)


def reliability_bins(labels_N: Sequence[int], probabilities_NK: ArrayLike, bins: int = BINS) -> list[Bin]:
    """Confidence (the largest probability of a row) against accuracy, in bins of equal width over 0..1."""
    rows_NK = np.asarray(probabilities_NK, dtype=np.float64)
    confidence_N = rows_NK.max(axis=1)
    right_N = rows_NK.argmax(axis=1) == np.asarray(labels_N)
    index_N = bin_of(confidence_N, bins)
    told = []
    for index in range(bins):
        inside = index_N == index
        count = int(inside.sum())
        mean, share = (
            (confidence_N[inside].mean(), right_N[inside].mean()) if count else (float("nan"), float("nan"))
        )
        told.append(Bin(index / bins, (index + 1) / bins, count, float(mean), float(share)))
    return told


def expected_calibration_error(
    labels_N: Sequence[int], probabilities_NK: ArrayLike, bins: int = BINS
) -> float:
    """Mean over rows of |accuracy - confidence| of their bin (Naeini et al. 2015; Guo et al. 2017, eq. 3).

    Returns:
        0..1, NaN without rows. With few rows it is biased upwards: bins of a few rows are never exact.
    """
    filled = [entry for entry in reliability_bins(labels_N, probabilities_NK, bins) if entry.count]
    if not filled:
        return float("nan")
    rows = sum(entry.count for entry in filled)
    return sum(entry.count * abs(entry.accuracy - entry.confidence) for entry in filled) / rows


def log_probabilities(probabilities_NK: ArrayLike) -> NDArray[np.float64]:
    """ln of probabilities clipped from below to SMALLEST_PROBABILITY; any shape."""
    return np.log(np.maximum(np.asarray(probabilities_NK, dtype=np.float64), SMALLEST_PROBABILITY))


def apply_temperature(probabilities_NK: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """softmax(ln p / T): T > 1 makes answers less sure, T < 1 surer, and the order of classes stays.

    Args:
        probabilities_NK: [..., K], clipped from below to SMALLEST_PROBABILITY.
        temperature: T > 0.
    """
    from scipy.special import softmax  # half a second with scipy.optimize, and few who start need it

    return softmax(log_probabilities(probabilities_NK) / temperature, axis=-1)


def fit_temperature(
    labels_N: Sequence[int], probabilities_NK: ArrayLike, weights_N: ArrayLike | None = None
) -> float:
    """The T with the smallest mean of -ln p of the true class (Guo et al. 2017, section 4.2).

    Args:
        labels_N: N >= 1 class indices of rows that the network was not trained on.
        weights_N: >= 0, what each row counts; None for equal.

    Returns:
        T within e^-3 .. e^3; 1.0 where the rows say nothing about it (all of them uniform).
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    labels = np.asarray(labels_N)
    logits_NK = log_probabilities(probabilities_NK)
    weights = np.ones(labels.size) if weights_N is None else np.asarray(weights_N, dtype=np.float64)
    if np.ptp(logits_NK, axis=1).max(initial=0.0) < 1e-9:
        return 1.0

    def loss(log_temperature: float) -> float:
        of_truth_N = log_softmax(logits_NK / np.exp(log_temperature), axis=1)[np.arange(labels.size), labels]
        return float(-(weights @ of_truth_N) / weights.sum())

    found = minimize_scalar(loss, bounds=_LOG_TEMPERATURES, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))
