"""Scores of groups, shares with intervals, and curves."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from training.evaluation import curves, scoring
from training.evaluation.scoring import Rows

NAMES = ("CE", "LAA")


def rows_of(count: int = 60, *, seed: int = 0, slides_a_patient: int = 2) -> Rows:
    generator = np.random.default_rng(seed)
    patient_N = np.arange(count) // slides_a_patient
    labels_N = patient_N % 2
    p_N = np.clip(0.35 + 0.3 * labels_N + generator.normal(0, 0.2, count), 0.01, 0.99)
    ids = tuple(f"s{n}" for n in range(count))
    return Rows(ids, tuple(f"p{n}" for n in patient_N), labels_N, np.stack([1 - p_N, p_N], axis=1))


def test_a_group_holds_the_values_of_scikit_learn_inside_their_intervals() -> None:
    rows = rows_of()
    told = scoring.score_group(rows, NAMES, replicates=400)
    p_N = rows.probabilities_NK[:, 1]
    assert told["scores"]["roc_auc"]["value"] == pytest.approx(roc_auc_score(rows.labels_N, p_N))
    assert told["scores"]["brier"]["value"] == pytest.approx(brier_score_loss(rows.labels_N, p_N))
    assert told["scores"]["weighted_log_loss"]["value"] == pytest.approx(log_loss(rows.labels_N, p_N))
    assert (told["n"], told["patients"], told["by_class"]) == (60, 30, {"CE": 30, "LAA": 30})
    for entry in told["scores"].values():
        assert entry["low"] < entry["high"]
    auc = told["scores"]["roc_auc"]
    assert auc["low"] < auc["value"] < auc["high"]


def test_one_class_is_not_defined_but_no_crash() -> None:
    rows = rows_of()
    told = scoring.score_group(rows[rows.labels_N == 0], NAMES, replicates=100)
    assert told["undefined"] == "only CE"
    assert told["scores"]["roc_auc"] == {"value": None, "low": None, "high": None}
    assert told["scores"]["accuracy"]["value"] is not None
    empty = scoring.score_group(rows[np.zeros(60, bool)], NAMES, replicates=100)
    assert (empty["n"], empty["undefined"]) == (0, "no answers")
    assert curves.roc(rows[rows.labels_N == 0], 1) is None


def test_one_patient_has_no_interval() -> None:
    rows = rows_of(4, slides_a_patient=4)
    told = scoring.score_group(rows, NAMES, replicates=100)
    assert told["scores"]["accuracy"]["low"] is None


def test_patients_are_means_over_their_slides() -> None:
    rows = rows_of(6)
    patients = scoring.patient_rows(rows)
    assert patients.ids == ("p0", "p1", "p2")
    np.testing.assert_allclose(patients.probabilities_NK[1], rows.probabilities_NK[2:4].mean(axis=0))
    assert patients.labels_N.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("part", "whole", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)],  # Newcombe 1998's method 3
)
def test_wilson_intervals(part: int, whole: int, low: float, high: float) -> None:
    told = scoring.share(part, whole)
    assert told["value"] == part / whole
    assert told["low"] == pytest.approx(low, abs=1e-4)
    assert told["high"] == pytest.approx(high, abs=1e-4)
    assert scoring.share(0, 0)["value"] is None


def test_confusion_counts_true_class_in_rows() -> None:
    values_NK = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]])
    told = scoring.confusion(Rows(tuple("abcd"), tuple("abcd"), np.array([0, 0, 1, 1]), values_NK), NAMES)
    assert told["counts"] == [[1, 1], [1, 1]]
    values_NK[3] = (0.1, 0.9)
    told = scoring.confusion(Rows(tuple("abcd"), tuple("abcd"), np.array([0, 0, 1, 1]), values_NK), NAMES)
    assert told["counts"] == [[1, 1], [0, 2]]
    assert (
        told["classes"]["LAA"]["sensitivity"]["part"],
        told["classes"]["LAA"]["sensitivity"]["whole"],
    ) == (2, 2)
    assert (told["classes"]["LAA"]["precision"]["part"], told["classes"]["LAA"]["precision"]["whole"]) == (
        2,
        3,
    )
    assert told["classes"]["CE"]["precision"]["value"] == 1.0


def test_abstention_leaves_the_least_certain_out_first_and_equals_together() -> None:
    p_N = np.array([0.99, 0.45, 0.8, 0.55])  # the second is wrong; the last is as uncertain as it
    rows = Rows(tuple("abcd"), tuple("abcd"), np.array([1, 1, 1, 1]), np.stack([1 - p_N, p_N], axis=1))
    entropy_N = scoring.entropy(rows.probabilities_NK)
    assert entropy_N[1] == pytest.approx(entropy_N[3])
    entropy_N[3] = entropy_N[1]
    points = scoring.abstention(rows, entropy_N)
    assert [point["coverage"] for point in points] == [1.0, 0.5, 0.25]
    assert [point["wrong"]["part"] for point in points] == [1, 0, 0]


def test_difference_to_itself_is_nothing_and_sees_a_better_model() -> None:
    rows = rows_of()
    same = scoring.difference(rows, rows, replicates=50)
    assert same["roc_auc"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    generator = np.random.default_rng(1)
    guesses_N = generator.random(60)
    guess = Rows(rows.ids, rows.patients, rows.labels_N, np.stack([1 - guesses_N, guesses_N], axis=1))
    better = scoring.difference(rows, guess, replicates=200)["roc_auc"]
    assert 0 < better["low"] < better["value"] < better["high"]


def test_reliability_bins_hold_every_answer() -> None:
    rows = rows_of()
    bins = scoring.reliability(rows)
    assert sum(entry["right"]["whole"] for entry in bins) == 60
    right = (rows.probabilities_NK.argmax(axis=1) == rows.labels_N).sum()
    assert sum(entry["right"]["part"] for entry in bins) == right
    assert all(entry["low"] <= entry["confidence"] <= entry["high"] for entry in bins)


def test_curves_lie_in_their_bands_and_have_the_right_area() -> None:
    rows = rows_of(200, seed=4)
    curve = curves.roc(rows, 1, band=True)
    assert curve is not None
    assert curve.low_G is not None
    assert curve.high_G is not None
    area = np.trapezoid(curve.y_P, curve.x_P) if hasattr(np, "trapezoid") else np.trapz(curve.y_P, curve.x_P)
    assert area == pytest.approx(roc_auc_score(rows.labels_N, rows.probabilities_NK[:, 1]))
    middle_G = np.interp(curves.GRID, curve.x_P, curve.y_P)
    inside = (curve.low_G <= middle_G + 1e-9) & (middle_G <= curve.high_G + 1e-9)
    assert inside[1:-1].mean() > 0.95
    assert (curve.high_G - curve.low_G)[20:40].max() > 0.02
    recall = curves.precision_recall(rows, 1)
    assert recall is not None
    assert (np.diff(recall.x_P) >= 0).all()
    assert (recall.positives, recall.negatives) == (100, 100)
