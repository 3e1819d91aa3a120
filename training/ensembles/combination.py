"""One way of joining members, fitted to rows, and its answers to rows that it was not fitted to."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.calibration import apply_temperature, fit_temperature
from training.ensembles import stacking, voting
from training.errors import DataError
from training.folds import deal_rows

Method = Literal["soft", "hard", "stack"]
METHODS: tuple[Method, ...] = ("soft", "hard", "stack")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be fitted.

    Attributes:
        weights_M: sum to 1; what members count in voting and in uncertainty.
        with_temperature: fit a temperature on top.
    """

    method: Method
    weights_M: NDArray[np.float64]
    with_temperature: bool = False

    @property
    def learns(self) -> bool:
        """Whether anything depends on the labels."""
        return self.method == "stack" or self.with_temperature


@dataclasses.dataclass(frozen=True)
class Combination:
    """A fitted way of joining members.

    Attributes:
        meta: the meta-learner of stacking, else None.
        temperature: 1.0 leaves answers as they are.
    """

    method: Method
    weights_M: NDArray[np.float64]
    meta: stacking.MetaLearner | None = None
    temperature: float = 1.0

    def apply(self, probabilities_MNK: ArrayLike) -> NDArray[np.float64]:
        """The ensemble's probabilities float64 [N, K] from those of its members."""
        if self.meta is not None:
            joined_NK = self.meta.apply(probabilities_MNK)
        else:
            vote = voting.hard if self.method == "hard" else voting.soft
            joined_NK = vote(probabilities_MNK, self.weights_M)
        return joined_NK if self.temperature == 1.0 else apply_temperature(joined_NK, self.temperature)


def fit(
    plan: Plan,
    labels_N: NDArray[np.intp],
    probabilities_MNK: NDArray[np.float64],
    patients_N: NDArray[np.str_],
    fold_N: NDArray[np.intp] | None,
) -> Combination:
    """Fit all that `plan` asks for on these rows.

    The temperature of a stack is fitted on answers that its meta-learner gives by cross-validation within the rows:
    its answers to rows that it was fitted on are too sure. In it every patient weighs the same.

    Args:
        fold_N: folds by patient of these rows, for what is cross-validated within them; None where `plan` does not
            learn.
    """
    if not plan.learns or fold_N is None:
        return Combination(plan.method, plan.weights_M)
    meta = None
    if plan.method == "stack":
        meta = stacking.fit(labels_N, probabilities_MNK, patients_N, fold_N)
    untempered = Combination(plan.method, plan.weights_M, meta)
    if not plan.with_temperature:
        return untempered
    plain = dataclasses.replace(plan, with_temperature=False)
    joined_NK = cross_fitted(plain, labels_N, probabilities_MNK, patients_N, stacking.joined_folds(fold_N))
    _, patient_N, slides_P = np.unique(patients_N, return_inverse=True, return_counts=True)
    temperature = fit_temperature(labels_N.tolist(), joined_NK, 1 / slides_P[patient_N])
    return dataclasses.replace(untempered, temperature=temperature)


def cross_fitted(
    plan: Plan,
    labels_N: NDArray[np.intp],
    probabilities_MNK: NDArray[np.float64],
    patients_N: NDArray[np.str_],
    fold_N: NDArray[np.intp],
) -> NDArray[np.float64]:
    """Answers float64 [N, K]; those to the rows of a fold come from a combination fitted on the other folds alone.

    Args:
        fold_N: no patient is in two folds.

    Raises:
        DataError: the folds beside some fold lack a class.
    """
    if not plan.learns:
        return Combination(plan.method, plan.weights_M).apply(probabilities_MNK)
    if np.unique(fold_N).size < 2:
        needed = "three folds are" if plan.method == "stack" else "two folds are"
        raise DataError("folds", [f"at least {needed} needed to fit and test what was asked for"])
    answers_NK = np.empty(probabilities_MNK.shape[1:])
    classes = np.unique(labels_N).size
    for fold in np.unique(fold_N):
        held_out, rest = fold_N == fold, fold_N != fold
        if np.unique(labels_N[rest]).size < classes:
            raise DataError("folds", [f"without fold {fold} a class is missing; take other folds"])
        fitted = fit(plan, labels_N[rest], probabilities_MNK[:, rest], patients_N[rest], fold_N[rest])
        answers_NK[held_out] = fitted.apply(probabilities_MNK[:, held_out])
    return answers_NK


def inner_folds(
    labels_N: NDArray[np.intp], patients_N: NDArray[np.str_], *, folds: int, seed: int
) -> NDArray[np.intp]:
    """A fold for each row, by patient, classes even; as many as asked for, or as the rarest class has patients.

    Raises:
        DataError: fewer than two classes, or a class with one patient only: nothing can be fitted and tested then.
    """
    _, first_P = np.unique(patients_N, return_index=True)
    counts = np.bincount(labels_N[first_P])
    counts = counts[counts > 0]
    if counts.size < 2 or counts.min() < 2:
        raise DataError(
            "fitting by patient",
            [
                "at least two classes with two patients each are needed; use soft or hard voting without temperature"
            ],
        )
    order_N = np.argsort(patients_N, kind="stable")  # so that the order of the rows does not matter
    fold_N = np.empty(labels_N.size, dtype=np.intp)
    fold_N[order_N] = deal_rows(
        labels_N[order_N], patients_N[order_N], folds=min(folds, int(counts.min())), seed=seed
    )
    return fold_N
