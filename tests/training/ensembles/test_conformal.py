"""training/ensembles/conformal.py"""

from __future__ import annotations

import math

import numpy as np
import pytest

from training.ensembles import conformal


def answers(generator: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes, answers that know something."""
    labels = generator.integers(0, 3, rows)
    logits = generator.normal(size=(rows, 3)) + 1.5 * np.eye(3)[labels]
    values = np.exp(logits)
    return labels, values / values.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("alpha", [0.1, 0.25])
def test_sets_hold_the_truth_as_often_as_promised(alpha: float) -> None:
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        labels, rows = answers(
            generator, 39 + 100
        )  # (39 + 1)(1 - alpha) is a whole number: coverage is exact
        threshold = conformal.fit_threshold(labels[:39], rows[:39], alpha)
        covered.append(conformal.selective_scores(labels[39:], rows[39:], threshold)["coverage"])
    error = np.std(covered) / math.sqrt(len(covered))
    assert abs(np.mean(covered) - (1 - alpha)) < 4 * error + 0.002
    assert error < 0.005


def test_the_quantile_is_that_of_a_finite_sample() -> None:
    rows = np.array([(1 - p, p) for p in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)])
    labels = [1] * 9  # scores 0.1, 0.2 .. 0.9
    assert conformal.fit_threshold(labels, rows, 0.5) == pytest.approx(0.5)  # the 5th of (9 + 1) * 0.5
    assert conformal.fit_threshold(labels, rows, 0.1) == pytest.approx(0.9)  # the 9th
    assert conformal.fit_threshold(labels, rows, 0.05) == 1.0  # the 10th of 9: nothing is excluded
    assert conformal.prediction_sets(rows, 1.0).all()


def test_answers_are_given_where_one_class_is_left() -> None:
    rows = np.array([(0.9, 0.1), (0.6, 0.4), (0.5, 0.5), (0.2, 0.8)])
    assert conformal.answered(rows, 0.3).tolist() == [
        True,
        False,
        False,
        True,
    ]  # no class of the second is above 0.7
    assert conformal.answered(rows, 0.6).tolist() == [True, False, False, True]  # both of it are above 0.4
    assert conformal.answered(rows, [0.05, 0.4, 0.4, 0.9]).tolist() == [False, True, False, False]
    told = conformal.selective_scores([0, 1, 1, 0], rows, 0.3)
    assert told == {"answered": 0.5, "accuracy_of_answered": 0.5, "coverage": 0.25, "balanced_coverage": 0.25}
    assert math.isnan(conformal.selective_scores([0], np.array([(0.5, 0.5)]), 0.3)["accuracy_of_answered"])
