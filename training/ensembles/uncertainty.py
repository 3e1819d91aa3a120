"""How unsure an ensemble is, and how much of that is its members disagreeing."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr


@dataclasses.dataclass(frozen=True)
class Uncertainty:
    """One value a row, in nats where it is an entropy.

    Attributes:
        entropy_N: of the ensemble's answer, 0..ln K: all uncertainty, that of the data included.
        mutual_information_N: entropy of the members' mean minus the mean of their entropies, 0..ln K (BALD; Houlsby
            et al. 2011, eq. 2): what the members disagree about; 0 where they are of one mind, however unsure.
        std_N: weighted standard deviation between members of the probability of the class that their mean prefers,
            0..0.5.
    """

    entropy_N: NDArray[np.float64]
    mutual_information_N: NDArray[np.float64]
    std_N: NDArray[np.float64]


def predictive_entropy(probabilities_NK: ArrayLike) -> NDArray[np.float64]:
    """- sum_k p_k ln p_k of each row, float64 [N]."""
    return entr(np.asarray(probabilities_NK, dtype=np.float64)).sum(axis=-1)


def of_members(
    probabilities_MNK: ArrayLike, weights_M: NDArray[np.float64], answer_NK: ArrayLike | None = None
) -> Uncertainty:
    """Uncertainty of an ensemble from what each member says.

    Args:
        probabilities_MNK: rows sum to 1.
        weights_M: sum to 1.
        answer_NK: what the ensemble answers, where that is not the weighted mean (voting, stacking, temperature).
    """
    values_MNK = np.asarray(probabilities_MNK, dtype=np.float64)
    mean_NK = np.einsum("m,mnk->nk", weights_M, values_MNK)
    of_mean_N = predictive_entropy(mean_NK)
    mean_of_N = weights_M @ predictive_entropy(values_MNK)
    preferred_MN = np.take_along_axis(values_MNK, mean_NK.argmax(axis=1)[None, :, None], axis=2)[:, :, 0]
    variance_N = weights_M @ (preferred_MN - weights_M @ preferred_MN) ** 2
    return Uncertainty(
        entropy_N=of_mean_N if answer_NK is None else predictive_entropy(answer_NK),
        mutual_information_N=np.maximum(of_mean_N - mean_of_N, 0.0),
        std_N=np.sqrt(variance_N),
    )
