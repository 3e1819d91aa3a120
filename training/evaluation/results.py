"""From answers to results: what each model, and what they say together, is scored on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.ensembles import uncertainty
from training.ensembles.definition import Ensemble
from training.errors import EvaluationError
from training.evaluation.candidates import Model
from training.evaluation.prediction import Predictions, SlideAnswer
from training.evaluation.scoring import Rows, slide_rows

SOFT = "soft mean of all"


@dataclasses.dataclass(frozen=True)
class Result:
    """One set of answers that is scored.

    Attributes:
        members: names of the models that it is made of; itself for a single one.
        answers: of the member whose tiles are shown (the first).
        slides: one row a slide.
        disagreement_N: mutual information between members in nat, a slide; None for a single model.
        ensemble: the definition that was applied; None otherwise.
    """

    name: str
    members: tuple[str, ...]
    answers: tuple[SlideAnswer, ...]
    slides: Rows
    disagreement_N: NDArray[np.float64] | None = None
    ensemble: Ensemble | None = None


def results_of(
    models: Sequence[Model], predictions: Predictions, class_names: Sequence[str], ensemble_path: Path | None
) -> list[Result]:
    """Every model, the soft mean of several, and the ensemble of a file, if one is given; what is shown in detail is last.

    Raises:
        EnsembleError: as `Ensemble.load`.
        EvaluationError: the ensemble is of other members or classes.
    """
    results = []
    for model in models:
        answers = tuple(predictions.of_model[model.name])
        results.append(Result(model.name, (model.name,), answers, _rows(answers, class_names)))
    if len(models) == 1 and ensemble_path is None:
        return results
    probabilities_MNK = np.stack([one.slides.probabilities_NK for one in results])
    names = tuple(model.name for model in models)
    if len(models) > 1:
        equal_M = np.full(len(models), 1 / len(models))
        results.append(
            _joined(SOFT, names, results[0], probabilities_MNK.mean(axis=0), probabilities_MNK, equal_M)
        )
    if ensemble_path is not None:
        ensemble = Ensemble.load(ensemble_path)
        order = _order(ensemble, models, class_names, ensemble_path)
        members_MNK = probabilities_MNK[order]
        name = f"{ensemble.combination.method} ensemble ({ensemble_path.name})"
        ordered, weights_M = tuple(names[place] for place in order), ensemble.combination.weights_M
        joined_NK = ensemble.apply(members_MNK)
        results.append(_joined(name, ordered, results[order[0]], joined_NK, members_MNK, weights_M, ensemble))
    return results


def _rows(answers: Sequence[SlideAnswer], class_names: Sequence[str]) -> Rows:
    values = [answer.probabilities_K for answer in answers]
    return slide_rows([answer.record for answer in answers], np.array(values), class_names)


def _joined(
    name: str,
    members: tuple[str, ...],
    shown: Result,
    joined_NK: NDArray[np.float64],
    probabilities_MNK: NDArray[np.float64],
    weights_M: NDArray[np.float64],
    ensemble: Ensemble | None = None,
) -> Result:
    rows = dataclasses.replace(shown.slides, probabilities_NK=np.asarray(joined_NK, dtype=np.float64))
    disagreement_N = uncertainty.of_members(probabilities_MNK, weights_M).mutual_information_N
    return Result(name, members, shown.answers, rows, disagreement_N, ensemble)


def _order(ensemble: Ensemble, models: Sequence[Model], class_names: Sequence[str], path: Path) -> list[int]:
    """Places of the ensemble's members among the models: by checkpoint or name where all agree, else by position."""
    members = [member.name for member in ensemble.members]
    names = [model.name for model in models]
    problems = []
    if ensemble.class_names != tuple(class_names):
        problems.append(
            f"it knows the classes {', '.join(ensemble.class_names)}, not {', '.join(class_names)}"
        )
    if len(members) != len(names):
        problems.append(
            f"it has {len(members)} members ({', '.join(members)}), there are {len(names)} models ({', '.join(names)})"
        )
    if problems:
        raise EvaluationError(str(path), problems)
    paths = [{one.path.resolve() for one in model.candidates} for model in models]
    said = [
        None if member.checkpoint is None else Path(member.checkpoint).resolve()
        for member in ensemble.members
    ]
    found = [next((place for place, own in enumerate(paths) if one in own), -1) for one in said]
    if sorted(found) == list(range(len(names))):
        return found
    if sorted(members) == sorted(names):
        return [names.index(member) for member in members]
    return list(range(len(names)))
