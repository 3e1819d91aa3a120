"""What scores.json holds: everything that the report says in numbers, and every reason to doubt them."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from training import provenance, scores
from training.ensembles import conformal
from training.ensembles.definition import Abstention
from training.evaluation import scoring
from training.evaluation.assignment import Assignment
from training.evaluation.candidates import OPTIMISTIC, TRAINED, UNKNOWN, WATCHED, Candidate, Model
from training.evaluation.data import Data
from training.evaluation.prediction import Predictions, SlideAnswer
from training.evaluation.results import Result
from training.evaluation.scoring import Rows

FORMAT = "clotline.evaluation"
VERSION = 1
FEW_PATIENTS = 10
SAME_LOG_LOSS = 1e-3
"""Other hardware moves the last digits of a probability, not more."""
_OWN_VERSIONS = {name: importlib.metadata.version(name) for name in ("scikit-learn", "matplotlib")}
MOST_TILES_WITH_INTERVALS = 20_000
_TOLD = {
    TRAINED: "were trained on",
    WATCHED: "decided when training stopped",
    UNKNOWN: "may have been trained on (the checkpoint does not say who was)",
}


def summarise(
    models: Sequence[Model],
    results: Sequence[Result],
    assignment: Assignment,
    predictions: Predictions,
    data: Data,
    *,
    split: str,
    replicates: int,
) -> dict[str, Any]:
    """The whole evaluation as JSON types; the last of `results` is the one that the report shows in detail."""
    class_names = models[0].first.spec.class_names
    shown = results[-1]
    bad = {**_asked_and_bad(models, assignment, data, split), **predictions.bad}
    exposed = assignment.exposed_patients()
    answered = {answer.record.patient_id for answer in shown.answers}
    exposed = {patient_id: why for patient_id, why in exposed.items() if patient_id in answered}
    return {
        "format": FORMAT,
        "version": VERSION,
        "split": split,
        "class_names": list(class_names),
        "data": {
            "source": data.source.name,
            "fingerprint": predictions.fingerprint,
            "slides": len(shown.answers),
            "patients": len(answered),
            "centres": sorted({answer.record.center_id for answer in shown.answers}),
            "bad_slides": [{"image_id": key, "reason": bad[key]} for key in sorted(bad)],
        },
        "exposed_patients": exposed,
        "warnings": _warnings(models, results, assignment, exposed, data, split),
        "notes": list(assignment.notes),
        "shown": shown.name,
        "bootstrap": {"replicates": replicates, "level": scoring.LEVEL, "resampled": "patients"},
        "models": [_of_result(one, results[0], assignment, class_names, replicates) for one in results],
        "checkpoints": [_of_candidate(one, predictions) for model in models for one in model.candidates],
        **provenance.provenance(),
        "versions": {**provenance.versions(), **_OWN_VERSIONS},
    }


def _asked_and_bad(models: Sequence[Model], assignment: Assignment, data: Data, split: str) -> dict[str, str]:
    """Of the slides that are known to be bad, those that would have been asked about."""
    asked = {record.image_id for record in assignment.records}
    asked |= {image_id for model in models for one in model.candidates for image_id in one.held_out_slides}
    return {image_id: why for image_id, why in data.bad.items() if image_id in asked or split == "all"}


def _of_result(
    result: Result, first: Result, assignment: Assignment, class_names: Sequence[str], replicates: int
) -> dict[str, Any]:
    slides, patients = result.slides, scoring.patient_rows(result.slides)
    levels = {"slide": slides, "patient": patients}

    def scored(rows: Rows) -> dict[str, Any]:
        return scoring.score_group(rows, class_names, replicates=replicates)

    tiles = tile_rows(result, class_names)
    told: dict[str, Any] = {
        "name": result.name,
        "members": list(result.members),
        "levels": {level: scored(rows) for level, rows in levels.items()},
        "confusion": {level: scoring.confusion(rows, class_names) for level, rows in levels.items()},
        "reliability": {level: scoring.reliability(rows) for level, rows in levels.items()},
        "abstention": {
            level: scoring.abstention(rows, scoring.entropy(rows.probabilities_NK)) if len(rows) else []
            for level, rows in levels.items()
        },
        "centres": {
            centre: {"slide": scored(of_centre), "patient": scored(scoring.patient_rows(of_centre))}
            for centre, of_centre in by_centre(result).items()
        },
        "folds": {name: scored(scoring.patient_rows(rows)) for name, rows in _by_fold(result).items()},
        "by_exposure": _by_exposure(result, assignment, patients, scored),
    }
    if tiles is not None:
        fits = len(tiles) <= MOST_TILES_WITH_INTERVALS
        told["levels"]["tile"] = scoring.score_group(tiles, class_names, replicates=replicates if fits else 0)
    if result is not first:
        told["minus_first"] = {
            level: scoring.difference(rows, of_first, replicates=replicates)
            for level, rows, of_first in (
                ("slide", slides, first.slides),
                ("patient", patients, scoring.patient_rows(first.slides)),
            )
        }
    if result.ensemble is not None and result.ensemble.abstention is not None:
        told["conformal"] = _conformal(result.ensemble.abstention, patients)
    return told


def tile_rows(result: Result, class_names: Sequence[str]) -> Rows | None:
    """One row a tile with the label of its slide; None unless every answer is that of a tile checkpoint alone."""
    if result.disagreement_N is not None or not result.answers:
        return None
    parts = [answer.tiles.tile_probabilities_TK for answer in result.answers]
    told = [part for part in parts if part is not None]
    if len(told) < len(parts) or any(len(answer.candidates) > 1 for answer in result.answers):
        return None
    counts = [len(part) for part in told]

    def repeated(values: Sequence[str]) -> tuple[str, ...]:
        return tuple(np.repeat(np.array(values, dtype=object), counts).tolist())

    return Rows(
        repeated(result.slides.ids),
        repeated(result.slides.patients),
        np.repeat(result.slides.labels_N, counts),
        np.concatenate(told).astype(np.float64),
    )


def by_centre(result: Result) -> dict[str, Rows]:
    """The rows of each centre's slides, centres in the order of their names."""
    centres = np.array([answer.record.center_id for answer in result.answers])
    return {str(centre): result.slides[centres == centre] for centre in np.unique(centres)}


def _by_fold(result: Result) -> dict[str, Rows]:
    """The rows that each checkpoint of a cross-validation answered; empty for anything else."""
    names = np.array(
        [" ".join(one.name for one in answer.candidates) for answer in result.answers], dtype=object
    )
    if result.disagreement_N is not None or len(set(names)) < 2:
        return {}
    return {str(name): result.slides[names == name] for name in dict.fromkeys(names.tolist())}


def worst_errors(result: Result, count: int) -> list[int]:
    """Places of wrong answers, the most confident first."""
    rows = result.slides
    wrong_N = np.flatnonzero(rows.probabilities_NK.argmax(axis=1) != rows.labels_N)
    confidence_N = rows.probabilities_NK.max(axis=1)[wrong_N]
    return [int(place) for place in wrong_N[np.argsort(-confidence_N, kind="stable")][:count]]


def _by_exposure(
    result: Result, assignment: Assignment, patients: Rows, scored: Any
) -> dict[str, dict[str, Any]]:
    """Patients grouped by what training had to do with them, where there is more than one such group."""
    worst = [
        min((assignment.exposure[member].get(patient, "held out") for member in result.members), key=_rank)
        for patient in patients.ids
    ]
    kinds = Counter(worst)
    if len(kinds) < 2:
        return {}
    return {kind: scored(patients[np.array(worst) == kind]) for kind in sorted(kinds, key=_rank)}


def _rank(kind: str) -> int:
    """The most flattering exposure first."""
    return OPTIMISTIC.index(kind) if kind in OPTIMISTIC else len(OPTIMISTIC)


def _warnings(
    models: Sequence[Model],
    results: Sequence[Result],
    assignment: Assignment,
    exposed: Mapping[str, str],
    data: Data,
    split: str,
) -> list[dict[str, str]]:
    """{"severity": "danger" | "caution", "text": ...}, the worst first."""
    shown = results[-1]
    patients = scoring.patient_rows(shown.slides)
    told = []
    for kind in OPTIMISTIC:
        those = sorted(patient for patient, why in exposed.items() if why == kind)
        if those:
            text = (
                f"{len(those)} of the {len(patients)} evaluated patients {_TOLD[kind]}: {_listed(those)}. "
                "Scores that include them are too good and say nothing about new patients."
            )
            told.append({"severity": "danger", "text": text})
    if shown.ensemble is not None:
        those = sorted(set(shown.ensemble.fitted_on_patients) & set(patients.ids))
        if those:
            text = (
                f"The ensemble was fitted (weights, meta-learner, temperature or threshold) on {len(those)} of the "
                f"{len(patients)} evaluated patients: {_listed(those)}. Its scores here are too good; those that "
                "`python -m training ensemble` printed are nested by patient."
            )
            told.append({"severity": "danger", "text": text})
    counts = np.bincount(patients.labels_N, minlength=len(models[0].first.spec.class_names))
    for name, count in zip(models[0].first.spec.class_names, counts, strict=True):
        if count < FEW_PATIENTS:
            text = f"Only {count} patient{'s' if count != 1 else ''} of class {name}: every score is rough, its interval too."
            told.append({"severity": "caution", "text": text})
    told += [{"severity": "caution", "text": text} for text in _changed_since_training(models, results)]
    if len(models) > 1:
        text = (
            "Several models are compared on the same patients. Choosing the best of them here makes its score too good; "
            "confirm it on patients that had no part in the choice."
        )
        told.append({"severity": "caution", "text": text})
    own = data.source.store.spec_of_cut.stain_normalise if data.source.store is not None else "none"
    for model in models:
        trained = _stain(model.first)
        if trained != own:
            text = (
                f"{model.name} was trained on tiles with stain normalisation {trained!r}; these have {own!r}."
            )
            told.append({"severity": "caution", "text": text})
    return told


def _changed_since_training(models: Sequence[Model], results: Sequence[Result]) -> Iterator[str]:
    """Checkpoints whose held-out slides, all of them, score otherwise here than at the end of training."""
    for model, result in zip(models, results, strict=False):
        who_N = np.array([answer.candidates[0].name for answer in result.answers], dtype=object)
        for candidate in model.candidates:
            then = candidate.manifest["metrics"].get("patient_log_loss")
            rows = result.slides[who_N == candidate.name]
            if then is None or set(rows.ids) != candidate.held_out_slides:
                continue
            patients = scoring.patient_rows(rows)
            now = scores.weighted_log_loss(patients.labels_N.tolist(), patients.probabilities_NK)
            if abs(now - then) > SAME_LOG_LOSS:
                yield (
                    f"{candidate.name}: on the same held-out patients the weighted log loss is {now:.4f} here and was "
                    f"{then:.4f} at the end of training; slides, tiles or code have changed in between."
                )


def _stain(candidate: Candidate) -> str:
    """How the stain of the training tiles was normalised; manifests from before that was possible say nothing."""
    cut = candidate.manifest["data"].get("cut") or {}
    return str(cut.get("stain_normalise") or candidate.manifest.get("recipe", {}).get("stain", "none"))


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names) - most} more)" if len(names) > most else "")


def _conformal(rule: Abstention, patients: Rows) -> dict[str, Any]:
    """How the ensemble's own threshold does on these patients."""
    sets_NK = conformal.prediction_sets(patients.probabilities_NK, rule.threshold)
    answered_N = sets_NK.sum(axis=1) == 1
    wrong_N = patients.probabilities_NK.argmax(axis=1) != patients.labels_N
    held_N = sets_NK[np.arange(len(patients)), patients.labels_N]
    return {
        "alpha": rule.alpha,
        "threshold": rule.threshold,
        "answered": scoring.share(int(answered_N.sum()), len(patients)),
        "truth_in_set": scoring.share(int(held_N.sum()), len(patients)),
        "wrong": scoring.share(int((wrong_N & answered_N).sum()), int(answered_N.sum())),
    }


def _of_candidate(candidate: Candidate, predictions: Predictions) -> dict[str, Any]:
    manifest, data = candidate.manifest, candidate.manifest["data"]
    weights: dict[str, Any] = {
        key: manifest[key] for key in ("weights_sha256", "encoder_sha256", "head_sha256") if key in manifest
    }
    return {
        "name": candidate.name,
        "path": str(candidate.path),
        "kind": candidate.kind,
        "architecture": manifest["architecture"],
        **weights,
        "git_commit": manifest.get("git_commit"),
        "created_utc": manifest.get("created_utc"),
        "versions": manifest.get("versions", {}),
        "recipe": manifest.get("recipe", {}),
        "bags": manifest.get("bags"),
        "spec": manifest["spec"],
        "metrics": manifest["metrics"],
        "data": {key: len(value) if isinstance(value, list) else value for key, value in data.items()},
        "batch_tiles": predictions.batch_tiles.get(candidate.name),
    }


def exposure_of(answer: SlideAnswer, result: Result, assignment: Assignment) -> str:
    """What training had to do with the patient of an answer, the worst of all members."""
    kinds = [
        assignment.exposure[member].get(answer.record.patient_id, "held out") for member in result.members
    ]
    return min(kinds, key=_rank)
