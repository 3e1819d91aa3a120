"""training/calibration.py"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import softmax

from training import calibration


def test_bins_count_confidence_and_accuracy() -> None:
    rows = np.array([(0.9, 0.1), (0.8, 0.2), (0.95, 0.05), (0.45, 0.55), (0.5, 0.5)])
    told = calibration.reliability_bins([0, 1, 0, 1, 1], rows, bins=5)
    assert [entry.count for entry in told] == [0, 0, 2, 1, 2]  # 0.8 belongs to (0.6, 0.8]
    assert (told[2].low, told[2].high) == (0.4, 0.6)
    assert told[2].confidence == pytest.approx(0.525)
    assert told[2].accuracy == 0.5
    assert math.isnan(told[0].accuracy)
    expected = (2 * abs(0.5 - 0.525) + abs(0 - 0.8) + 2 * abs(1 - 0.925)) / 5
    assert calibration.expected_calibration_error([0, 1, 0, 1, 1], rows, bins=5) == pytest.approx(expected)
    assert math.isnan(calibration.expected_calibration_error([], np.empty((0, 2))))


def test_certain_answers_have_a_bin() -> None:
    told = calibration.reliability_bins([0, 1], np.array([(1.0, 0.0), (0.0, 1.0)]), bins=3)
    assert [entry.count for entry in told] == [0, 0, 2]
    assert calibration.expected_calibration_error([0, 1], np.eye(2)) == 0.0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_temperature_that_made_answers_too_sure_is_found(temperature: float, classes: int) -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (20_000, classes))
    true = softmax(logits, axis=1)
    labels = (true.cumsum(axis=1) < generator.random((20_000, 1))).sum(axis=1)
    told = softmax(logits * temperature, axis=1)
    found = calibration.fit_temperature(labels.tolist(), told)
    assert found == pytest.approx(temperature, rel=0.05)
    mended = calibration.apply_temperature(told, found)
    assert np.abs(mended - true).max() < 0.02
    assert (mended.argmax(axis=1) == told.argmax(axis=1)).all()
    if temperature > 1:
        before, after = (
            calibration.expected_calibration_error(labels.tolist(), rows) for rows in (told, mended)
        )
        assert after < before / 3


def test_weights_count_rows() -> None:
    labels, rows = [0, 0, 1], np.array([(0.9, 0.1), (0.9, 0.1), (0.8, 0.2)])
    weighted = calibration.fit_temperature([0, 1], rows[1:], [2, 1])
    assert weighted == pytest.approx(calibration.fit_temperature(labels, rows), rel=1e-3)


def test_uniform_answers_have_no_temperature() -> None:
    assert calibration.fit_temperature([0, 1, 1], np.full((3, 2), 0.5)) == 1.0
