"""python -m training.benchmarks stacking-noise

Stacks out-of-fold tables of pure noise and reports the areas under the ROC curve that the ensemble states of itself, by
patient. They must be 0.5: within 0.05 in every repetition with many patients, and in the mean over repetitions with few
patients and many members, where a meta-learner that has seen the rows it is scored on is furthest above 0.5. That area
is measured as well (`fitted_rows_roc_auc`): the benchmark could fail.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax
from tqdm import tqdm

from slides.labels import SlideRecord
from training.ensembles import combination, stacking
from training.ensembles.assessment import assess, scores_of
from training.ensembles.combination import Plan
from training.ensembles.tables import Members
from training.scores import roc_auc

LIMIT = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--repetitions", type=int, default=10, help="tables of each size (default: 10)")
    parser.add_argument("--many-patients", type=int, default=2000, help="default: 2000, with 3 members")
    parser.add_argument("--few-patients", type=int, default=100, help="default: 100, with 10 members")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Stack noise of both sizes; `passed` is the bar of 0.5 +- 0.05."""
    sizes = {"many": (options.many_patients, 3), "few": (options.few_patients, 10)}
    areas: dict[str, list[float]] = {name: [] for name in sizes}
    across: list[float] = []
    cheating: list[float] = []
    with tqdm(total=len(sizes) * options.repetitions, unit="table", desc="stacking noise") as progress:
        for number, (name, (patients, count)) in enumerate(sizes.items()):
            for repetition in range(options.repetitions):
                members = noise(patients, count, seed=[options.seed, number, repetition])
                told = stacked_scores(members, seed=repetition)
                areas[name].append(told["roc_auc"])
                if name == "few":
                    across.append(told["roc_auc_across_folds"])
                    cheating.append(_fitted_rows_area(members))
                progress.update()
    worst = max(areas["many"], key=lambda area: abs(area - 0.5))
    few_mean = float(np.mean(areas["few"]))
    return {
        "benchmark": "stacking-noise",
        "passed": abs(worst - 0.5) <= LIMIT and abs(few_mean - 0.5) <= LIMIT,
        "limit": LIMIT,
        "many_patients": options.many_patients,
        "many_roc_auc_mean": round(float(np.mean(areas["many"])), 4),
        "many_roc_auc_furthest": round(worst, 4),
        "few_patients": options.few_patients,
        "few_roc_auc_mean": round(few_mean, 4),
        "few_roc_auc_std": round(float(np.std(areas["few"])), 4),
        "few_roc_auc_across_folds_mean": round(float(np.mean(across)), 4),
        "fitted_rows_roc_auc_mean": round(float(np.mean(cheating)), 4),
        "repetitions": options.repetitions,
        "cores": os.cpu_count(),
    }


def noise(patients: int, members: int, *, seed: int | list[int]) -> Members:
    """Answers that know nothing: 1 to 3 slides a patient, 30 % LAA, members that share half of their noise."""
    generator = np.random.default_rng(seed)
    records = []
    for number in range(patients):
        label = (
            "LAA" if number < 2 or (number > 3 and generator.random() < 0.3) else "CE"
        )  # two of each at least
        for slide in range(int(generator.integers(1, 4))):
            name = f"p{number:05d}"
            records.append(
                SlideRecord(f"{name}_{slide}", "1", name, slide, label, Path(f"{name}_{slide}.tif"))
            )
    shape = (members, len(records), 2)
    logits_MNK = generator.normal(size=shape[1:]) + generator.normal(size=shape)
    names = tuple(f"member {number}" for number in range(members))
    return Members(names, ("CE", "LAA"), tuple(records), softmax(logits_MNK, axis=2))


def stacked_scores(members: Members, *, seed: int, folds: int = 5) -> dict[str, float]:
    """The scores by patient that stacking reports of itself."""
    count = len(members.names)
    fold_N = combination.inner_folds(members.labels_N, members.patients_N, folds=folds, seed=seed)
    assessment = assess(members, Plan("stack", np.full(count, 1 / count)), fold_N, None)
    return scores_of(assessment, members, replicates=0, seed=seed)["patient"]


def _fitted_rows_area(members: Members) -> float:
    """What a regression that is scored on the rows it was fitted on would report."""
    fitted = stacking.fit_regression(members.labels_N, members.probabilities_MNK, members.patients_N)
    answers_PK = members.by_patient(fitted.apply(members.probabilities_MNK))
    return roc_auc(members.labels_P.tolist(), answers_PK)
