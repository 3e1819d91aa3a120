"""training/scores.py, against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

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
