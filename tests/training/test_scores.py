"""training/scores.py, against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics

from slides.labels import SlideRecord
from training import scores


def two(*second: float) -> np.ndarray:
    """Rows (1 - p, p)."""
    return np.array([(1 - p, p) for p in second], dtype=np.float64)


def test_auc_counts_pairs_in_the_right_order() -> None:
    # positives 0.8 and 0.4 against negatives 0.5 and 0.1: three of four pairs are in order
    assert scores.roc_auc([1, 0, 1, 0], two(0.8, 0.5, 0.4, 0.1)) == 0.75
    assert scores.roc_auc([1, 0], two(0.5, 0.5)) == 0.5
    assert math.isnan(scores.roc_auc([1, 1], two(0.5, 0.6)))


def test_auc_of_three_classes_is_the_mean_of_one_against_the_rest() -> None:
    rows = np.array([(0.6, 0.3, 0.1), (0.5, 0.4, 0.1), (0.2, 0.7, 0.1), (0.1, 0.8, 0.1), (0.3, 0.3, 0.4)])
    assert scores.roc_auc([0, 0, 1, 1, 2], rows) == 1.0
    # class 2 is absent: classes 0 and 1 alone count; 1 has three of its four pairs in order, 0 three of four as well
    rows = np.array([(0.6, 0.3, 0.1), (0.2, 0.75, 0.05), (0.25, 0.7, 0.05), (0.1, 0.8, 0.1)])
    assert scores.roc_auc([0, 0, 1, 1], rows) == pytest.approx(0.75)


def test_log_loss_weighs_classes_alike() -> None:
    loss = scores.weighted_log_loss([0, 0, 0, 1], two(0.1, 0.1, 0.1, 0.5))
    assert loss == pytest.approx((-math.log(0.9) - math.log(0.5)) / 2)
    assert scores.weighted_log_loss([0, 1], two(1.0, 1.0)) == pytest.approx(-math.log(1e-15) / 2)


def test_patients_average_slides_not_tiles() -> None:
    # patient p (LAA): a slide of three bad tiles and one of a good tile; patient q (CE): one middling tile
    records = [
        SlideRecord("p_0", "1", "p", 0, "LAA", Path("p_0.tif")),
        SlideRecord("p_1", "1", "p", 1, "LAA", Path("p_1.tif")),
        SlideRecord("q_0", "1", "q", 0, "CE", Path("q_0.tif")),
    ]
    rows = two(0.3, 0.3, 0.3, 0.9, 0.4).astype(np.float32)
    told = scores.score(rows, ["p_0", "p_0", "p_0", "p_1", "q_0"], records, ("CE", "LAA"))
    assert told["tile_accuracy"] == pytest.approx(2 / 5)
    assert told["slide_accuracy"] == pytest.approx(2 / 3)
    assert told["slide_auc"] == pytest.approx(0.5)
    assert told["patient_accuracy"] == 1.0
    assert told["patient_auc"] == 1.0
    assert told["patient_log_loss"] == pytest.approx(-math.log(0.6), rel=1e-6)


def brute_force(labels: list[int], rows: np.ndarray) -> dict[str, float]:
    """The scores by their definitions, pair by pair and row by row."""
    rows_of = range(len(labels))
    classes = [1] if rows.shape[1] == 2 else sorted(set(labels))
    areas, precisions = [], []
    for k in classes:
        pairs = [(rows[i, k], rows[j, k]) for i in rows_of for j in rows_of if labels[i] == k != labels[j]]
        areas.append(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))
        positives = labels.count(k)
        precision = recall_before = 0.0
        for threshold in sorted(set(rows[:, k]), reverse=True):
            taken = [i for i in rows_of if rows[i, k] >= threshold]
            right = sum(labels[i] == k for i in taken)
            precision += right / len(taken) * (right / positives - recall_before)
            recall_before = right / positives
        precisions.append(precision)
    losses = [
        [-math.log(min(max(rows[i, k] / rows[i].sum(), 1e-15), 1 - 1e-15)) for i in rows_of if labels[i] == k]
        for k in sorted(set(labels))
    ]
    right = [int(np.argmax(rows[i])) == labels[i] for i in rows_of]
    recalls = [np.mean([right[i] for i in rows_of if labels[i] == k]) for k in sorted(set(labels))]
    squares = [sum((rows[i, k] - (labels[i] == k)) ** 2 for k in range(rows.shape[1])) for i in rows_of]
    gaps = []
    for number in range(15):
        inside = [i for i in rows_of if number / 15 < max(rows[i]) <= (number + 1) / 15]
        gaps.append(abs(sum(right[i] - max(rows[i]) for i in inside)))
    return {
        "roc_auc": float(np.mean(areas)),
        "pr_auc": float(np.mean(precisions)),
        "weighted_log_loss": sum(sum(loss) / len(loss) for loss in losses) / len(losses),
        "accuracy": sum(right) / len(right),
        "balanced_accuracy": float(np.mean(recalls)),
        "brier": sum(squares) / len(squares) / (2 if rows.shape[1] == 2 else 1),
        "expected_calibration_error": sum(gaps) / len(labels),
    }


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_scores_are_what_their_formulas_say(classes: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = [*range(classes), *generator.integers(0, classes, 40).tolist()]
    rows = (
        generator.dirichlet(np.ones(classes), len(labels)).round(1) + 0.01
    )  # ties; divided so that sums are 1
    rows /= rows.sum(axis=1, keepdims=True)
    assert scores.all_scores(labels, rows) == pytest.approx(brute_force(labels, rows), abs=1e-12)
    reference = sklearn.metrics.brier_score_loss(labels, rows, labels=list(range(classes)))
    assert scores.brier(labels, rows) == pytest.approx(reference)
    assert scores.balanced_accuracy(labels, rows) == pytest.approx(
        sklearn.metrics.balanced_accuracy_score(labels, rows.argmax(axis=1))
    )


def test_log_loss_takes_the_weights_of_classes() -> None:
    rows = two(0.1, 0.1, 0.5)
    loss = scores.weighted_log_loss([0, 0, 1], rows, class_weights_K=[1, 3])
    assert loss == pytest.approx((-math.log(0.9) - 3 * math.log(0.5)) / 4)
    unscaled = scores.weighted_log_loss([0, 0, 1], rows * 7)  # rows are divided by their sum first
    assert unscaled == pytest.approx(scores.weighted_log_loss([0, 0, 1], rows))
    assert scores.weighted_log_loss([0, 1, 1], two(0.5, 0.5, 0.5)) == pytest.approx(math.log(2))


def test_pairs_are_taken_within_folds() -> None:
    # fold 0 has its one pair in order, fold 1 too; across folds one of the two further pairs is not
    labels, rows, folds = [1, 0, 1, 0], two(0.9, 0.8, 0.2, 0.1), [0, 0, 1, 1]
    assert scores.roc_auc(labels, rows) == 0.75
    assert scores.roc_auc(labels, rows, folds) == 1.0
    assert math.isnan(scores.roc_auc(labels, rows, [0, 1, 0, 1]))  # every fold has one class only
    uneven = scores.roc_auc([1, 0, 0, 1, 0], two(0.3, 0.1, 0.5, 0.1, 0.2), [0, 0, 0, 1, 1])
    assert uneven == pytest.approx(1 / 3)  # 1 of 2 pairs and 0 of 1


def test_undefined_scores_are_null_in_json() -> None:
    one_class = scores.all_scores([1, 1], two(0.6, 0.7))
    assert math.isnan(one_class["roc_auc"])
    assert math.isnan(one_class["pr_auc"])
    assert one_class["accuracy"] == one_class["balanced_accuracy"] == 1.0
    told = scores.finite_or_none(one_class, digits=3)
    assert told["roc_auc"] is None
    assert told["weighted_log_loss"] == round(-(math.log(0.6) + math.log(0.7)) / 2, 3)
    assert set(scores.all_scores([], np.empty((0, 2)))) == set(scores.SCORES)
    assert all(math.isnan(value) for value in scores.all_scores([], np.empty((0, 2))).values())
