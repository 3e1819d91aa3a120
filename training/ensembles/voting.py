"""Soft and hard voting: what members answer, joined by fixed weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.errors import EnsembleError


def normalised_weights(weights: Sequence[float] | None, members: int) -> NDArray[np.float64]:
    """Weights divided by their sum, float64 [M]; equal ones for None.

    Raises:
        EnsembleError: not one weight a member, a weight that is negative or not finite, or none above 0.
    """
    if weights is None:
        return np.full(members, 1 / members)
    values_M = np.asarray(weights, dtype=np.float64)
    problems = []
    if values_M.size != members:
        problems.append(f"{values_M.size} weights for {members} members; give one each")
    problems += [
        f"weight {value:g} is {'negative' if value < 0 else 'not finite'}; weights are 0 or more"
        for value in values_M.tolist()
        if not (np.isfinite(value) and value >= 0)
    ]
    if not problems and not values_M.sum() > 0:
        problems.append("all weights are 0; at least one must be more")
    if problems:
        raise EnsembleError("weights", problems)
    return values_M / values_M.sum()


def soft(probabilities_MNK: ArrayLike, weights_M: NDArray[np.float64]) -> NDArray[np.float64]:
    """p_nk = sum_m w_m p_mnk, float64 [N, K]; `weights_M` sum to 1."""
    return np.einsum("m,mnk->nk", weights_M, np.asarray(probabilities_MNK, dtype=np.float64))


def hard(probabilities_MNK: ArrayLike, weights_M: NDArray[np.float64]) -> NDArray[np.float64]:
    """p_nk = sum of w_m over the members whose most probable class is k (the first of equals), float64 [N, K]."""
    values_MNK = np.asarray(probabilities_MNK, dtype=np.float64)
    votes_MNK = np.eye(values_MNK.shape[2])[values_MNK.argmax(axis=2)]
    return np.einsum("m,mnk->nk", weights_M, votes_MNK)
