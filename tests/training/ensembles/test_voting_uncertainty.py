"""training/ensembles/voting.py and uncertainty.py, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from training.ensembles import uncertainty, voting
from training.errors import EnsembleError

TWO_MEMBERS = np.array([[[0.9, 0.1], [0.4, 0.6]], [[0.2, 0.8], [0.3, 0.7]]])


def test_soft_votes_are_weighted_means() -> None:
    weights = voting.normalised_weights([3, 1], 2)
    expected = [[0.725, 0.275], [0.375, 0.625]]
    assert voting.soft(TWO_MEMBERS, weights).tolist() == [pytest.approx(row) for row in expected]


def test_hard_votes_are_shares_of_weights() -> None:
    weights = voting.normalised_weights([3, 1], 2)
    assert voting.hard(TWO_MEMBERS, weights).tolist() == [[0.75, 0.25], [0.0, 1.0]]
    assert voting.hard([[[0.5, 0.5]]], np.ones(1)).tolist() == [[1.0, 0.0]]  # the first of equals


def test_weights_that_cannot_be_are_all_told() -> None:
    assert voting.normalised_weights(None, 4).tolist() == [0.25] * 4
    with pytest.raises(EnsembleError) as caught:
        voting.normalised_weights([1, -2, math.nan], 2)
    assert len(caught.value.problems) == 3
    with pytest.raises(EnsembleError, match="all weights are 0"):
        voting.normalised_weights([0, 0], 2)


def test_disagreement_is_apart_from_doubt() -> None:
    doubt = np.array([[[0.5, 0.5]], [[0.5, 0.5]]])
    quarrel = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    half = np.full(2, 0.5)
    of_doubt, of_quarrel = uncertainty.of_members(doubt, half), uncertainty.of_members(quarrel, half)
    assert of_doubt.entropy_N[0] == of_quarrel.entropy_N[0] == pytest.approx(math.log(2))
    assert of_doubt.mutual_information_N[0] == of_doubt.std_N[0] == 0
    assert of_quarrel.mutual_information_N[0] == pytest.approx(math.log(2))
    assert of_quarrel.std_N[0] == 0.5


def test_uncertainty_is_what_its_formulas_say() -> None:
    weights = np.array([0.75, 0.25])
    told = uncertainty.of_members(TWO_MEMBERS, weights)

    def entropy(*values: float) -> float:
        return -sum(value * math.log(value) for value in values)

    mean_of = 0.75 * entropy(0.9, 0.1) + 0.25 * entropy(0.2, 0.8)
    assert told.entropy_N[0] == pytest.approx(entropy(0.725, 0.275))
    assert told.mutual_information_N[0] == pytest.approx(entropy(0.725, 0.275) - mean_of)
    assert told.std_N[0] == pytest.approx(math.sqrt(0.75 * (0.9 - 0.725) ** 2 + 0.25 * (0.2 - 0.725) ** 2))
    other = uncertainty.of_members(TWO_MEMBERS, weights, np.array([[1.0, 0.0], [0.5, 0.5]]))
    assert other.entropy_N.tolist() == [0.0, pytest.approx(math.log(2))]
    assert (other.mutual_information_N == told.mutual_information_N).all()
