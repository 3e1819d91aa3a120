"""Stacking: a meta-learner that turns what M members say into one answer, fitted on out-of-fold predictions.

The features of a row are its centred log-probabilities (the centred log-ratio of Aitchison 1982)

    x_mk = ln p_mk - mean_j ln p_mj        p clipped from below to 1e-6

and the answer is softmax(A x + b) with A [K, M * K] (column m * K + k) and b [K]. Two ways to find A and b compete:

- **pooled**: A = a / (M s_m) for the features of member m, one a > 0 for all, s_m their standard deviation: a geometric
  mean of members brought to the same spread (a logarithmic opinion pool) with a temperature, and an intercept a
  class. Nothing is learnt about who is better.
- **regression**: multinomial logistic regression with an L2 penalty, on features of the same spread.

The regression is taken only where, in a cross-validation by patient *inside the rows that it is fitted on*, its log loss
is below the pooled one's by more than one standard error (the one-standard-error rule of Breiman et al. 1984). With
a few hundred patients and members that are alike the regression would mostly learn noise.

In both, every patient weighs the same and every class weighs the same. So the intercept does not follow the share of a
class among the patients at hand; else a fold with more of a class leaves fewer of it to fit on, its answers sink, and
the pooled area under the curve of pure noise comes out below 0.5 (Parker, Günter and Bedo 2007).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from training.calibration import log_probabilities

INVERSE_PENALTY = 0.3
"""C of scikit-learn's LogisticRegression, where the weights of the rows sum to the number of patients."""
CHOICE_FOLDS = 5
_LOG_SCALES = (-3.0, 3.0)
_LARGEST_INTERCEPT = 10.0


@dataclasses.dataclass(frozen=True)
class MetaLearner:
    """softmax(A x + b).

    Attributes:
        kind: "pooled" or "regression".
        coefficients_KF: A, float64 [K, M * K].
        intercept_K: b, float64 [K].
    """

    kind: str
    coefficients_KF: NDArray[np.float64]
    intercept_K: NDArray[np.float64]

    def logits(self, probabilities_MNK: ArrayLike) -> NDArray[np.float64]:
        """A x + b, float64 [N, K]."""
        return features(probabilities_MNK) @ self.coefficients_KF.T + self.intercept_K

    def apply(self, probabilities_MNK: ArrayLike) -> NDArray[np.float64]:
        """Probabilities float64 [N, K] from those of the members [M, N, K]."""
        return softmax(self.logits(probabilities_MNK), axis=1)


def features(probabilities_MNK: ArrayLike) -> NDArray[np.float64]:
    """x, float64 [N, M * K], member by member."""
    logs_MNK = log_probabilities(probabilities_MNK)
    centred_MNK = logs_MNK - logs_MNK.mean(axis=2, keepdims=True)
    members, rows, classes = centred_MNK.shape
    return centred_MNK.transpose(1, 0, 2).reshape(rows, members * classes)


def row_weights(labels_N: NDArray[np.intp], patients_N: NDArray[np.str_]) -> NDArray[np.float64]:
    """Weights that let every patient of a class, and every class, count the same; their sum is the number of patients."""
    _, patient_N, slides_P = np.unique(patients_N, return_inverse=True, return_counts=True)
    weights_N = 1 / slides_P[patient_N]
    classes = np.unique(labels_N)
    for k in classes:
        weights_N[labels_N == k] /= weights_N[labels_N == k].sum()
    return weights_N * slides_P.size / classes.size


def fit(
    labels_N: NDArray[np.intp],
    probabilities_MNK: NDArray[np.float64],
    patients_N: NDArray[np.str_],
    fold_N: NDArray[np.intp],
) -> MetaLearner:
    """The meta-learner for these rows.

    Args:
        labels_N: class indices; every class 0..K-1 occurs.
        probabilities_MNK: out-of-fold: no member has seen the row that it speaks of.
        patients_N: whose row it is.
        fold_N: folds by patient, in which pooled and regression are compared.
    """
    if probabilities_MNK.shape[0] > 1 and _regression_is_better(
        labels_N, probabilities_MNK, patients_N, joined_folds(fold_N)
    ):
        return fit_regression(labels_N, probabilities_MNK, patients_N)
    return fit_pooled(labels_N, probabilities_MNK, patients_N)


def joined_folds(fold_N: NDArray[np.intp]) -> NDArray[np.intp]:
    """The same folds, put together into CHOICE_FOLDS at most: enough to choose by, and faster."""
    return np.unique(fold_N, return_inverse=True)[1] % CHOICE_FOLDS


def fit_pooled(
    labels_N: NDArray[np.intp], probabilities_MNK: NDArray[np.float64], patients_N: NDArray[np.str_]
) -> MetaLearner:
    """One scale for the mean log-probabilities of all members, and an intercept a class, by maximum likelihood."""
    members, _, classes = probabilities_MNK.shape
    x_NF = features(probabilities_MNK)
    scale_F = members * _spread(x_NF, members)
    x_NK = (x_NF / scale_F).reshape(-1, members, classes).sum(axis=1)
    weights_N = row_weights(labels_N, patients_N)
    truth_NK = np.eye(classes)[labels_N]

    def loss_and_slope(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scale, intercept_K = np.exp(values[0]), values[1:]
        logs_NK = log_softmax(scale * x_NK + intercept_K, axis=1)
        error_NK = weights_N[:, None] * (np.exp(logs_NK) - truth_NK)
        slope = np.concatenate([[scale * (error_NK * x_NK).sum()], error_NK.sum(axis=0)])
        return float(-(weights_N @ (logs_NK * truth_NK).sum(axis=1))), slope

    bounds = [_LOG_SCALES, *[(-_LARGEST_INTERCEPT, _LARGEST_INTERCEPT)] * classes]
    found = minimize(loss_and_slope, np.zeros(1 + classes), jac=True, method="L-BFGS-B", bounds=bounds).x
    coefficients_KF = np.tile(np.eye(classes) * np.exp(found[0]), members) / scale_F
    return MetaLearner("pooled", coefficients_KF, found[1:] - found[1:].mean())


def fit_regression(
    labels_N: NDArray[np.intp], probabilities_MNK: NDArray[np.float64], patients_N: NDArray[np.str_]
) -> MetaLearner:
    """L2-penalised multinomial logistic regression; members are scaled to unit spread before they are penalised."""
    from sklearn.linear_model import LogisticRegression  # it takes seconds to import, and few need it

    members, _, classes = probabilities_MNK.shape
    x_NF = features(probabilities_MNK)
    scale_F = _spread(x_NF, members)
    model = LogisticRegression(C=INVERSE_PENALTY, max_iter=2000)
    model.fit(x_NF / scale_F, labels_N, sample_weight=row_weights(labels_N, patients_N))
    coefficients_KF, intercept_K = model.coef_, model.intercept_
    if classes == 2:  # scikit-learn gives the difference of the two rows
        coefficients_KF = np.concatenate([-coefficients_KF / 2, coefficients_KF / 2])
        intercept_K = np.concatenate([-intercept_K / 2, intercept_K / 2])
    return MetaLearner("regression", coefficients_KF / scale_F, intercept_K)


def _spread(x_NF: NDArray[np.float64], members: int) -> NDArray[np.float64]:
    """Standard deviation of a member's features, the mean over its classes, float64 [M * K]; 1 where there is none."""
    of_feature_MK = x_NF.std(axis=0).reshape(members, -1)
    spread_M = of_feature_MK.mean(axis=1)
    return np.repeat(np.where(spread_M > 1e-9, spread_M, 1.0), of_feature_MK.shape[1])


def _regression_is_better(
    labels_N: NDArray[np.intp],
    probabilities_MNK: NDArray[np.float64],
    patients_N: NDArray[np.str_],
    fold_N: NDArray[np.intp],
) -> bool:
    """Whether its log loss is lower by more than one standard error, cross-validated by patient within these rows."""
    _, first_P, patient_N = np.unique(patients_N, return_index=True, return_inverse=True)
    label_P = labels_N[first_P]
    folds = np.unique(fold_N)
    if folds.size < 2 or np.bincount(label_P).min() < 2:
        return False
    gain_N = np.empty(labels_N.size)
    for fold in folds:
        held_out, rest = fold_N == fold, fold_N != fold
        if np.unique(labels_N[rest]).size < probabilities_MNK.shape[2]:
            return False
        gain_N[held_out] = np.subtract(
            *(
                _losses(way, labels_N, probabilities_MNK, patients_N, rest, held_out)
                for way in (fit_pooled, fit_regression)
            )
        )
    gain_P = np.bincount(patient_N, gain_N) / np.bincount(patient_N)
    of_class = [gain_P[label_P == k] for k in np.unique(label_P)]
    mean = np.mean([values.mean() for values in of_class])
    error = np.sqrt(sum(values.var(ddof=1) / values.size for values in of_class)) / len(of_class)
    return bool(mean > error)


def _losses(
    way: Callable[[NDArray[np.intp], NDArray[np.float64], NDArray[np.str_]], MetaLearner],
    labels_N: NDArray[np.intp],
    probabilities_MNK: NDArray[np.float64],
    patients_N: NDArray[np.str_],
    rest: NDArray[np.bool_],
    held_out: NDArray[np.bool_],
) -> NDArray[np.float64]:
    fitted = way(labels_N[rest], probabilities_MNK[:, rest], patients_N[rest])
    logs_NK = log_softmax(fitted.logits(probabilities_MNK[:, held_out]), axis=1)
    return -np.take_along_axis(logs_NK, labels_N[held_out][:, None], axis=1)[:, 0]
