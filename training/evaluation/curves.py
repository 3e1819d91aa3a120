"""Points of ROC and precision-recall curves, with a band that says how far other patients could have moved them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from training.evaluation.scoring import LEVEL, Rows

GRID = np.linspace(0, 1, 101)
BAND_REPLICATES = 300


_Points = Callable[[NDArray[np.bool_], NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]
_AtGrid = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


@dataclasses.dataclass(frozen=True)
class Curve:
    """One class against the rest.

    Attributes:
        x_P, y_P: the points, x rising.
        low_G, high_G: the band at GRID, between which LEVEL of the resampled curves lie; None without one.
        positives, negatives: rows behind it.
    """

    x_P: NDArray[np.float64]
    y_P: NDArray[np.float64]
    low_G: NDArray[np.float64] | None
    high_G: NDArray[np.float64] | None
    positives: int
    negatives: int


def roc(rows: Rows, k: int, *, band: bool = False) -> Curve | None:
    """False positive rate against true positive rate of class k; None where one of both sides has no row."""
    return _curve(rows, k, _roc_points, _linear, band)


def precision_recall(rows: Rows, k: int, *, band: bool = False) -> Curve | None:
    """Recall against precision of class k; None where one of both sides has no row."""
    return _curve(rows, k, _precision_recall_points, _stepped, band)


def _linear(x_P: NDArray[np.float64], y_P: NDArray[np.float64]) -> NDArray[np.float64]:
    """The curve at GRID."""
    return np.interp(GRID, x_P, y_P)


def _stepped(x_P: NDArray[np.float64], y_P: NDArray[np.float64]) -> NDArray[np.float64]:
    """The curve at GRID. Between two recalls the precision is that of the larger one, as average precision has it."""
    return y_P[np.searchsorted(x_P, GRID - 1e-12)]


def _roc_points(
    truth_N: NDArray[np.bool_], value_N: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x_P, y_P, _ = roc_curve(truth_N, value_N, drop_intermediate=False)
    return x_P, y_P


def _precision_recall_points(
    truth_N: NDArray[np.bool_], value_N: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    precision_P, recall_P, _ = precision_recall_curve(truth_N, value_N)
    return recall_P[::-1], precision_P[::-1]


def _curve(rows: Rows, k: int, points: _Points, at_grid: _AtGrid, band: bool) -> Curve | None:
    truth_N, value_N = rows.labels_N == k, rows.probabilities_NK[:, k]
    positives = int(truth_N.sum())
    if positives in (0, len(rows)):
        return None
    x_P, y_P = points(truth_N, value_N)
    curves_RG = _resampled(rows, truth_N, value_N, points, at_grid) if band else []
    if len(curves_RG) < BAND_REPLICATES // 2:
        return Curve(x_P, y_P, None, None, positives, len(rows) - positives)
    tail = 100 * (1 - LEVEL) / 2
    low_G, high_G = np.percentile(np.stack(curves_RG), (tail, 100 - tail), axis=0)
    return Curve(x_P, y_P, low_G, high_G, positives, len(rows) - positives)


def _resampled(
    rows: Rows,
    truth_N: NDArray[np.bool_],
    value_N: NDArray[np.float64],
    points: _Points,
    at_grid: _AtGrid,
) -> list[NDArray[np.float64]]:
    """Patients are resampled whole; resamples of one class alone have no curve and are left out."""
    patients, patient_N = np.unique(np.asarray(rows.patients), return_inverse=True)
    rows_of = [np.flatnonzero(patient_N == patient) for patient in range(patients.size)]
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(BAND_REPLICATES):
        chosen = np.concatenate(
            [rows_of[one] for one in generator.integers(patients.size, size=patients.size)]
        )
        if 0 < truth_N[chosen].sum() < chosen.size:
            drawn.append(at_grid(*points(truth_N[chosen], value_N[chosen])))
    return drawn
