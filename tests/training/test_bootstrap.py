"""training/bootstrap.py"""

from __future__ import annotations

import math

import numpy as np
import pytest

from training import bootstrap, scores


def answers(rows: int, classes: int, seed: int) -> tuple[list[int], np.ndarray]:
    """Labels of which every class occurs, and probabilities with many ties."""
    generator = np.random.default_rng(seed)
    labels = [*range(classes), *generator.integers(0, classes, rows - classes).tolist()]
    values = generator.dirichlet(np.ones(classes), rows).round(1) + 0.01
    return labels, values / values.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("folds", [None, 4])
def test_a_replicate_is_scored_as_its_rows_written_out(classes: int, folds: int | None) -> None:
    labels, rows = answers(60, classes, seed=1)
    fold_N = None if folds is None else np.arange(60) % folds
    weights_RN = np.random.default_rng(2).integers(0, 4, (5, 60)).astype(float)
    told = bootstrap.scores_of_weighted_rows(np.array(labels), rows, weights_RN, fold_N)
    for replicate, weights_N in enumerate(weights_RN):
        chosen = np.repeat(np.arange(60), weights_N.astype(int))
        expected = scores.all_scores(
            [labels[row] for row in chosen], rows[chosen], None if fold_N is None else fold_N[chosen]
        )
        assert {name: values_R[replicate] for name, values_R in told.items()} == pytest.approx(expected)


def test_all_slides_of_a_patient_come_along() -> None:
    """Two patients a class: a replicate holds both slides of a patient or none, so half shares never occur."""
    labels, rows = [0, 0, 0, 0, 1, 1, 1, 1], np.eye(2)[[0, 0, 1, 1, 1, 1, 0, 0]]
    patients = ["a", "a", "b", "b", "c", "c", "d", "d"]
    told = bootstrap.replicated(labels, rows, patients, replicates=400, seed=0, within_class=True)
    assert set(told["balanced_accuracy"].round(6)) == {0.0, 0.25, 0.5, 0.75, 1.0}
    by_slide = bootstrap.replicated(labels, rows, list("abcdefgh"), replicates=400, seed=0, within_class=True)
    assert len(set(by_slide["balanced_accuracy"].round(6))) > 5


def test_intervals_are_repeatable_and_hold_the_score() -> None:
    labels, rows = answers(200, 2, seed=3)
    patients = [f"p{number // 2}" for number in range(200)]
    told = bootstrap.intervals(labels, rows, patients, replicates=300, seed=4)
    assert told == bootstrap.intervals(labels, rows, patients, replicates=300, seed=4)
    assert told != bootstrap.intervals(labels, rows, patients, replicates=300, seed=5)
    point = scores.all_scores(labels, rows)
    for name in ("roc_auc", "pr_auc", "weighted_log_loss", "accuracy", "balanced_accuracy", "brier"):
        low, high = told[name]
        assert low < point[name] < high
    narrow = bootstrap.intervals(labels, rows, patients, replicates=300, seed=4, level=0.5)
    assert narrow["roc_auc"][1] - narrow["roc_auc"][0] < told["roc_auc"][1] - told["roc_auc"][0]


def test_the_spread_is_that_of_the_formula() -> None:
    """The standard deviation of a share is sqrt(p (1 - p) / n)."""
    labels = [0] * 400
    rows = np.eye(2)[[0] * 300 + [1] * 100]
    told = bootstrap.replicated(labels, rows, [str(n) for n in range(400)], replicates=2000, seed=0)
    assert told["accuracy"].std() == pytest.approx(math.sqrt(0.75 * 0.25 / 400), rel=0.1)


def test_what_is_not_defined_is_nan() -> None:
    told = bootstrap.intervals([1, 1, 1], np.full((3, 2), 0.5), ["a", "b", "c"], replicates=50)
    assert all(map(math.isnan, told["roc_auc"]))
    assert told["brier"] == (0.25, 0.25)
    assert all(map(math.isnan, bootstrap.intervals([], np.empty((0, 2)), [], replicates=5)["brier"]))
    # one patient of class 1 among four: replicates without it have no area, the others count
    few = bootstrap.replicated([0, 0, 0, 1], np.eye(2)[[0, 0, 0, 1]], list("abcd"), replicates=200)
    assert 0 < np.isnan(few["roc_auc"]).sum() < 200
    low, high = bootstrap.intervals([0, 0, 0, 1], np.eye(2)[[0, 0, 0, 1]], list("abcd"), replicates=200)[
        "roc_auc"
    ]
    assert low == high == 1.0
