"""What an ensemble is worth on patients that no part of it was fitted on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from training import bootstrap
from training.ensembles import combination, conformal
from training.ensembles.combination import Combination, Plan
from training.ensembles.definition import Abstention
from training.ensembles.tables import Members
from training.scores import all_scores, roc_auc


@dataclasses.dataclass(frozen=True)
class Assessment:
    """An ensemble fitted on all patients, and answers to each patient from one that was fitted on others.

    Attributes:
        combination: fitted on all rows.
        abstention: its threshold from all patients; None where none was asked for.
        answers_NK: nested: the answer to a slide comes from a fit without its patient's fold.
        patient_answers_PK: mean of a patient's slides, in the order of `Members.patient_ids`.
        thresholds_P: of abstention, each from the patients of the other folds; None without abstention.
        fold_N: of the nesting; None where nothing was fitted.
    """

    combination: Combination
    abstention: Abstention | None
    answers_NK: NDArray[np.float64]
    patient_answers_PK: NDArray[np.float64]
    thresholds_P: NDArray[np.float64] | None
    fold_N: NDArray[np.intp] | None

    def thresholds_N(self, members: Members) -> NDArray[np.float64] | None:
        """The thresholds of the slides: each patient's own."""
        if self.thresholds_P is None:
            return None
        return self.thresholds_P[np.unique(members.patients_N, return_inverse=True)[1]]


# Hundreds of small regressions: a second thread of OpenBLAS gains nothing, and spins while others want its core.
@threadpool_limits.wrap(limits=1, user_api="blas")
def assess(members: Members, plan: Plan, fold_N: NDArray[np.intp] | None, alpha: float | None) -> Assessment:
    """Fit on all rows, and answer every row by a fit without its fold.

    Args:
        fold_N: needed where something is fitted (stacking, temperature, abstention), else None.
        alpha: of abstention; None for none.

    Raises:
        DataError: the folds do not allow it.
    """
    labels_N, patients_N, values_MNK = members.labels_N, members.patients_N, members.probabilities_MNK
    fitted = combination.fit(plan, labels_N, values_MNK, patients_N, fold_N)
    if fold_N is None:
        answers_NK = fitted.apply(values_MNK)
    else:
        answers_NK = combination.cross_fitted(plan, labels_N, values_MNK, patients_N, fold_N)
    of_patient_PK = members.by_patient(answers_NK)
    abstention = thresholds_P = None
    if alpha is not None and fold_N is not None:
        fold_P = fold_N[np.unique(patients_N, return_index=True)[1]]
        labels_P = members.labels_P
        threshold = conformal.fit_threshold(labels_P.tolist(), of_patient_PK, alpha)
        abstention = Abstention(alpha, threshold, labels_P.size)
        thresholds_P = np.empty(labels_P.size)
        for fold in np.unique(fold_P):
            rest = fold_P != fold
            thresholds_P[fold_P == fold] = conformal.fit_threshold(
                labels_P[rest].tolist(), of_patient_PK[rest], alpha
            )
    return Assessment(fitted, abstention, answers_NK, of_patient_PK, thresholds_P, fold_N)


def scores_of(
    assessment: Assessment, members: Members, *, replicates: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Scores of slides and patients with bootstrap intervals by patient, and what abstention does.

    Returns:
        "slide" and "patient": every score of `training.scores.SCORES`, roc_auc within folds where something was fitted
        (roc_auc_across_folds is then the area of all rows at once); "intervals": the same keys with [low, high], empty
        for 0 replicates; "abstained": "slide" and "patient" with `conformal.selective_scores`, empty without abstention.
    """
    fold_N = assessment.fold_N
    first_P = np.unique(members.patients_N, return_index=True)[1]
    levels = {
        "slide": (
            members.labels_N,
            assessment.answers_NK,
            members.patients_N,
            fold_N,
            assessment.thresholds_N(members),
        ),
        "patient": (
            members.labels_P,
            assessment.patient_answers_PK,
            members.patients_N[first_P],
            None if fold_N is None else fold_N[first_P],
            assessment.thresholds_P,
        ),
    }
    told: dict[str, dict[str, Any]] = {"intervals": {}, "abstained": {}}
    for level, (labels, answers, patients, folds, thresholds) in levels.items():
        told[level] = all_scores(labels.tolist(), answers, folds)
        if folds is not None:
            told[level]["roc_auc_across_folds"] = roc_auc(labels.tolist(), answers)
        if replicates:
            told["intervals"][level] = {
                name: list(limits)
                for name, limits in bootstrap.intervals(
                    labels.tolist(),
                    answers,
                    patients.tolist(),
                    fold_N=folds,
                    replicates=replicates,
                    seed=seed,
                ).items()
            }
        if thresholds is not None:
            told["abstained"][level] = conformal.selective_scores(labels.tolist(), answers, thresholds)
    return told
