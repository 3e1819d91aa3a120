"""Scores of answers as plain dictionaries: by level, centre and class, each with its interval and its sample size.

Every value that is not defined (an area under a curve where one class occurs alone) is None, and the entry
"undefined" of its group says why.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slides.aggregate import slides_to_patients
from slides.labels import SlideRecord
from training import bootstrap, calibration, scores

LEVEL = 0.95
_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution: Wilson's intervals at LEVEL


@dataclasses.dataclass(frozen=True)
class Rows:
    """Answers at one level.

    Attributes:
        ids: of the tile's slide, the slide or the patient.
        patients: whose row it is.
        labels_N: int64, index of the true class.
        probabilities_NK: float64.
    """

    ids: tuple[str, ...]
    patients: tuple[str, ...]
    labels_N: NDArray[np.int64]
    probabilities_NK: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, kept: NDArray[np.bool_]) -> Rows:
        places = np.flatnonzero(kept).tolist()
        return Rows(
            tuple(self.ids[place] for place in places),
            tuple(self.patients[place] for place in places),
            self.labels_N[kept],
            self.probabilities_NK[kept],
        )


def slide_rows(
    records: Sequence[SlideRecord], probabilities_NK: NDArray[np.float64], class_names: Sequence[str]
) -> Rows:
    """One row a slide; row n of `probabilities_NK` belongs to records[n]."""
    return Rows(
        tuple(record.image_id for record in records),
        tuple(record.patient_id for record in records),
        np.array([class_names.index(record.label) for record in records], dtype=np.int64),
        np.asarray(probabilities_NK, dtype=np.float64).reshape(len(records), len(class_names)),
    )


def patient_rows(slides: Rows) -> Rows:
    """One row a patient: the mean over their slides, in order of first appearance."""
    if not len(slides):
        return slides
    means = slides_to_patients(
        dict(zip(slides.ids, slides.probabilities_NK, strict=True)),
        dict(zip(slides.ids, slides.patients, strict=True)),
    )
    label_of = dict(zip(slides.patients, slides.labels_N.tolist(), strict=True))
    patients = tuple(means)
    return Rows(
        patients,
        patients,
        np.array([label_of[one] for one in patients], np.int64),
        np.stack(list(means.values())),
    )


def score_group(rows: Rows, class_names: Sequence[str], *, replicates: int, seed: int = 0) -> dict[str, Any]:
    """Scores of some rows.

    Returns:
        n, patients, by_class (class -> rows), undefined (None, "no answers" or "only CE"), and scores: name -> value,
        low, high (percentile bootstrap by patient, LEVEL; None where not defined, with replicates 0, and with fewer
        than two patients).
    """
    counts = np.bincount(rows.labels_N, minlength=len(class_names))
    occurring = [name for name, count in zip(class_names, counts, strict=True) if count]
    values = scores.all_scores(rows.labels_N.tolist(), rows.probabilities_NK)
    patients = len(set(rows.patients))
    limits: Mapping[str, tuple[float, float]] = {}
    if replicates and patients >= 2:
        limits = bootstrap.intervals(
            rows.labels_N.tolist(),
            rows.probabilities_NK,
            rows.patients,
            replicates=replicates,
            level=LEVEL,
            seed=seed,
        )
    nowhere = (math.nan, math.nan)
    return {
        "n": len(rows),
        "patients": patients,
        "by_class": {name: int(count) for name, count in zip(class_names, counts, strict=True)},
        "undefined": None if len(occurring) > 1 else f"only {occurring[0]}" if occurring else "no answers",
        "scores": {
            name: {
                "value": _finite(value),
                "low": _finite(limits.get(name, nowhere)[0]) if math.isfinite(value) else None,
                "high": _finite(limits.get(name, nowhere)[1]) if math.isfinite(value) else None,
            }
            for name, value in values.items()
        },
    }


def confusion(rows: Rows, class_names: Sequence[str]) -> dict[str, Any]:
    """Counts [true][answered], and of every class sensitivity and precision as shares with Wilson intervals."""
    size = len(class_names)
    answered_N = rows.probabilities_NK.argmax(axis=1) if len(rows) else np.zeros(0, np.int64)
    counts_KK = np.zeros((size, size), dtype=np.int64)
    np.add.at(counts_KK, (rows.labels_N, answered_N), 1)
    return {
        "class_names": list(class_names),
        "counts": counts_KK.tolist(),
        "classes": {
            name: {
                "sensitivity": share(int(counts_KK[k, k]), int(counts_KK[k].sum())),
                "precision": share(int(counts_KK[k, k]), int(counts_KK[:, k].sum())),
            }
            for k, name in enumerate(class_names)
        },
    }


def share(part: int, whole: int) -> dict[str, Any]:
    """part, whole, value and its 95 % interval by Wilson (1927), which also holds for few cases; None where whole is 0."""
    if whole == 0:
        return {"part": part, "whole": whole, "value": None, "low": None, "high": None}
    value = part / whole
    denominator = 1 + _Z**2 / whole
    centre = (value + _Z**2 / (2 * whole)) / denominator
    half = _Z * math.sqrt(value * (1 - value) / whole + _Z**2 / (4 * whole**2)) / denominator
    return {
        "part": part,
        "whole": whole,
        "value": value,
        "low": max(0.0, centre - half),
        "high": min(1.0, centre + half),
    }


def reliability(rows: Rows, bins: int = 10) -> list[dict[str, Any]]:
    """Filled bins of confidence: low, high, confidence (mean) and the share that is right, with counts and interval."""
    told = []
    for entry in (
        calibration.reliability_bins(rows.labels_N.tolist(), rows.probabilities_NK, bins) if len(rows) else ()
    ):
        if entry.count:
            right = share(round(entry.accuracy * entry.count), entry.count)
            told.append(
                {"low": entry.low, "high": entry.high, "confidence": entry.confidence, "right": right}
            )
    return told


def abstention(rows: Rows, uncertainty_N: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Risk and coverage (El-Yaniv and Wiener 2010): the least certain are left to a person, what is wrong of the rest?

    Args:
        uncertainty_N: larger is less certain; equal values are kept or left together.

    Returns:
        from all answered down to the most certain: coverage (share answered), threshold (the largest uncertainty
        that is still answered) and wrong (share among the answered, with interval).
    """
    order_N = np.argsort(uncertainty_N, kind="stable")
    sorted_N = uncertainty_N[order_N]
    wrong_N = (rows.probabilities_NK.argmax(axis=1) != rows.labels_N)[order_N].cumsum()
    ends = [
        place for place in range(len(rows)) if place + 1 == len(rows) or sorted_N[place + 1] > sorted_N[place]
    ]
    return [
        {
            "coverage": (place + 1) / len(rows),
            "threshold": float(sorted_N[place]),
            "wrong": share(int(wrong_N[place]), place + 1),
        }
        for place in reversed(ends)
    ]


def entropy(probabilities_NK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Predictive entropy as a share of its largest value ln K: 0 is certain, 1 is a guess."""
    rows_NK = np.clip(probabilities_NK, 1e-12, 1.0)
    return np.asarray(-(rows_NK * np.log(rows_NK)).sum(axis=1) / math.log(probabilities_NK.shape[1]))


def difference(
    one: Rows, other: Rows, *, replicates: int, seed: int = 0
) -> dict[str, dict[str, float | None]]:
    """Scores of `one` minus those of `other`, on the same rows and the same bootstrap samples of patients.

    Returns:
        score -> value, low, high; None where not defined.
    """
    values = scores.all_scores(one.labels_N.tolist(), one.probabilities_NK)
    against = scores.all_scores(other.labels_N.tolist(), other.probabilities_NK)
    told = {
        name: {"value": _finite(values[name] - against[name]), "low": None, "high": None}
        for name in scores.SCORES
    }
    if replicates and len(set(one.patients)) >= 2:
        drawn, drawn_against = (
            bootstrap.replicated(
                rows.labels_N.tolist(), rows.probabilities_NK, rows.patients, replicates=replicates, seed=seed
            )
            for rows in (one, other)
        )
        tail = 100 * (1 - LEVEL) / 2
        for name, entry in told.items():
            differences_R = drawn[name] - drawn_against[name]
            differences_R = differences_R[np.isfinite(differences_R)]
            if entry["value"] is not None and differences_R.size:
                entry["low"], entry["high"] = (
                    float(limit) for limit in np.percentile(differences_R, (tail, 100 - tail))
                )
    return told


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
