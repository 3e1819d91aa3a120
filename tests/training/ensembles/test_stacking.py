"""training/ensembles/stacking.py, combination.py, and the benchmark of noise"""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from training.benchmarks import stacking_noise
from training.ensembles import combination, stacking
from training.ensembles.assessment import assess, scores_of
from training.ensembles.combination import Plan
from training.ensembles.tables import Members
from training.errors import DataError
from training.scores import all_scores, weighted_log_loss

from .conftest import made_members


def stacked(members: Members, seed: int = 0) -> dict[str, float]:
    return stacking_noise.stacked_scores(members, seed=seed)


def soft(members: Members) -> dict[str, float]:
    return all_scores(members.labels_P.tolist(), members.by_patient(members.probabilities_MNK.mean(axis=0)))


def test_stacked_noise_has_an_area_of_one_half() -> None:
    areas = [stacked(stacking_noise.noise(1000, 3, seed=seed), seed)["roc_auc"] for seed in range(2)]
    assert np.abs(np.array(areas) - 0.5).max() < 0.05
    few = [stacked(stacking_noise.noise(60, 8, seed=[9, seed]), seed)["roc_auc"] for seed in range(8)]
    assert abs(np.mean(few) - 0.5) < 0.05


def test_a_meta_learner_that_saw_its_patients_would_be_caught() -> None:
    told = stacking_noise.run(argparse.Namespace(repetitions=3, many_patients=600, few_patients=60, seed=1))
    assert told["passed"]
    assert told["fitted_rows_roc_auc_mean"] > 0.65


def test_labels_of_a_fold_do_not_reach_its_own_answers() -> None:
    """With the labels of one fold turned round, its own answers stay to the bit; those of the others do not."""
    members = made_members(60, (1.0, 0.2))
    labels, patients = members.labels_N, members.patients_N
    fold_N = combination.inner_folds(labels, patients, folds=4, seed=0)
    plan = Plan("stack", np.full(2, 0.5), with_temperature=True)
    before = combination.cross_fitted(plan, labels, members.probabilities_MNK, patients, fold_N)
    turned = np.where(fold_N == 1, 1 - labels, labels)
    after = combination.cross_fitted(plan, turned, members.probabilities_MNK, patients, fold_N)
    assert (before[fold_N == 1] == after[fold_N == 1]).all()
    assert all((before[fold_N == fold] != after[fold_N == fold]).any() for fold in (0, 2, 3))


@pytest.mark.parametrize("seed", range(3))
def test_stacking_is_not_worse_than_averaging_members_that_are_alike(seed: int) -> None:
    members = made_members(150, (1.2, 1.2, 1.2), seed=seed)
    assert stacked(members)["roc_auc"] > soft(members)["roc_auc"] - 0.02
    assert stacked(members)["weighted_log_loss"] < soft(members)["weighted_log_loss"] + 0.01


@pytest.mark.parametrize("classes", [2, 3])
def test_stacking_finds_the_member_that_knows(classes: int) -> None:
    members = made_members(200, (3.0, 0.0, 0.0, 0.0), classes=classes, shared=0.0)
    alone, averaged, learnt = (
        all_scores(members.labels_P.tolist(), members.by_patient(members.probabilities_MNK[0])),
        soft(members),
        stacked(members),
    )
    assert learnt["weighted_log_loss"] < averaged["weighted_log_loss"] - 0.1
    assert learnt["roc_auc"] > alone["roc_auc"] - 0.02
    fold_N = combination.inner_folds(members.labels_N, members.patients_N, folds=5, seed=0)
    meta = stacking.fit(members.labels_N, members.probabilities_MNK, members.patients_N, fold_N)
    assert meta.kind == "regression"


def test_members_that_are_alike_are_pooled() -> None:
    members = made_members(120, (1.2, 1.2, 1.2))
    fold_N = combination.inner_folds(members.labels_N, members.patients_N, folds=5, seed=0)
    meta = stacking.fit(members.labels_N, members.probabilities_MNK, members.patients_N, fold_N)
    assert meta.kind == "pooled"
    blocks = meta.coefficients_KF.reshape(2, 3, 2)
    assert (blocks[0, :, 0] > 0).all()
    assert np.abs(blocks[0, :, 1]).max() == 0


@pytest.mark.parametrize("classes", [2, 3])
def test_pooled_scale_and_intercept_are_those_of_the_largest_likelihood(classes: int) -> None:
    members = made_members(100, (1.0, 1.0), classes=classes)
    labels, values, patients = members.labels_N, members.probabilities_MNK, members.patients_N
    meta = stacking.fit_pooled(labels, values, patients)
    weights = stacking.row_weights(labels, patients)

    def loss(learner: stacking.MetaLearner) -> float:
        return float(-weights @ np.log(learner.apply(values)[np.arange(labels.size), labels]))

    for scale, shift in ((1.03, 0.0), (0.97, 0.0), (1.0, 0.05), (1.0, -0.05)):
        moved = meta.intercept_K + shift * np.eye(classes)[0]
        assert loss(stacking.MetaLearner("", meta.coefficients_KF * scale, moved)) > loss(meta)


def test_every_patient_and_every_class_weighs_the_same() -> None:
    members = made_members(50)
    weights = stacking.row_weights(members.labels_N, members.patients_N)
    assert weights.sum() == pytest.approx(50)
    assert weights[members.labels_N == 0].sum() == pytest.approx(25)
    of_patient = [weights[members.patients_N == name].sum() for name in members.patient_ids]
    for k in (0, 1):
        assert np.ptp(np.array(of_patient)[members.labels_P == k]) < 1e-12


def test_a_temperature_is_found_and_helps() -> None:
    members = made_members(300, (1.5,))
    sure = members.probabilities_MNK**6 / (members.probabilities_MNK**6).sum(axis=2, keepdims=True)
    members = Members(members.names, members.class_names, members.records, sure)
    fold_N = combination.inner_folds(members.labels_N, members.patients_N, folds=5, seed=0)
    plain = assess(members, Plan("soft", np.ones(1)), None, None)
    tempered = assess(members, Plan("soft", np.ones(1), with_temperature=True), fold_N, None)
    assert 3 < tempered.combination.temperature < 12
    labels = members.labels_N.tolist()
    assert weighted_log_loss(labels, tempered.answers_NK) < weighted_log_loss(labels, plain.answers_NK) - 0.1
    assert (tempered.answers_NK.argmax(axis=1) == plain.answers_NK.argmax(axis=1)).all()


def test_thresholds_of_a_patient_come_from_other_folds() -> None:
    members = made_members(200, (1.5, 1.0))
    fold_N = combination.inner_folds(members.labels_N, members.patients_N, folds=4, seed=0)
    told = assess(members, Plan("soft", np.full(2, 0.5)), fold_N, 0.2)
    assert told.abstention is not None
    assert told.abstention.patients == 200
    assert told.thresholds_P is not None
    assert len(set(told.thresholds_P)) > 1
    scores = scores_of(told, members, replicates=0, seed=0)["abstained"]["patient"]
    assert scores["coverage"] > 0.75
    assert (
        scores["accuracy_of_answered"]
        > all_scores(members.labels_P.tolist(), told.patient_answers_PK)["accuracy"]
    )


def test_folds_do_not_depend_on_the_order_of_the_rows() -> None:
    members = made_members(40)
    order = np.random.default_rng(0).permutation(members.labels_N.size)
    one = combination.inner_folds(members.labels_N, members.patients_N, folds=5, seed=3)
    other = combination.inner_folds(members.labels_N[order], members.patients_N[order], folds=5, seed=3)
    assert (one[order] == other).all()


def test_too_few_patients_are_told() -> None:
    members = made_members(6)
    fold_N = combination.inner_folds(members.labels_N, members.patients_N, folds=5, seed=0)
    assert np.unique(fold_N).size == 3  # three patients of the rarer class
    one_class = members.labels_N * 0
    with pytest.raises(DataError, match="at least two classes with two patients"):
        combination.inner_folds(one_class, members.patients_N, folds=5, seed=0)
