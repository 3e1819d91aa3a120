"""training/ensembles/definition.py"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.ensembles import combination
from training.ensembles.assessment import assess
from training.ensembles.combination import Plan
from training.ensembles.definition import Ensemble, Member
from training.errors import EnsembleError

from .conftest import made_members


def made_ensemble(method: combination.Method, classes: int = 2, temperature: bool = False) -> Ensemble:
    members = made_members(60, (2.0, 0.5), classes=classes)
    fold_N = combination.inner_folds(members.labels_N, members.patients_N, folds=3, seed=0)
    told = assess(members, Plan(method, np.array([0.25, 0.75]), temperature), fold_N, 0.2)
    return Ensemble(
        members.class_names,
        (Member("a.csv", "0" * 64), Member("b.csv", "1" * 64, "runs/b/checkpoint")),
        told.combination,
        told.abstention,
        tuple(members.patient_ids),
        {"patient": {"roc_auc": 0.9}},
    )


@pytest.mark.parametrize("method", combination.METHODS)
@pytest.mark.parametrize("classes", [2, 3])
def test_a_definition_survives_its_file(method: combination.Method, classes: int, tmp_path: Path) -> None:
    ensemble = made_ensemble(method, classes, temperature=method != "hard")
    ensemble.save(tmp_path / "ensemble.json")
    read = Ensemble.load(tmp_path / "ensemble.json")
    assert read.as_dict() == ensemble.as_dict()
    values = made_members(30, (1.0, 1.0), classes=classes, seed=7).probabilities_MNK
    assert (read.apply(values) == ensemble.apply(values)).all()
    assert (read.answered(read.apply(values)) == ensemble.answered(ensemble.apply(values))).all()
    assert not read.answered(read.apply(values)).all()


@pytest.mark.parametrize("classes", [2, 3])
def test_the_formula_of_the_docs_gives_what_the_class_gives(classes: int) -> None:
    """An exporter has nothing but the file and docs/ensembles.md."""
    values = made_members(20, (1.0, 1.0), classes=classes, seed=3).probabilities_MNK
    for method in combination.METHODS:
        ensemble = made_ensemble(method, classes, temperature=method != "hard")
        file = json.loads(json.dumps(ensemble.as_dict()))
        for n in range(values.shape[1]):
            said = values[:, n]
            if method == "soft":
                answer = sum(w * p for w, p in zip(file["weights"], said, strict=True))
            elif method == "hard":
                answer = np.zeros(classes)
                for w, p in zip(file["weights"], said, strict=True):
                    answer[int(np.argmax(p))] += w
            else:
                meta = file["meta_learner"]
                logs = np.log(np.maximum(said, meta["smallest_probability"]))
                x = (logs - logs.mean(axis=1, keepdims=True)).reshape(-1)
                z = np.array(meta["coefficients"]) @ x + np.array(meta["intercept"])
                answer = np.exp(z) / np.exp(z).sum()
            if file["temperature"] != 1:
                powers = np.maximum(answer, 1e-6) ** (1 / file["temperature"])
                answer = powers / powers.sum()
            assert ensemble.apply(values)[n] == pytest.approx(answer, abs=1e-12)
            given = np.sum(answer >= 1 - file["abstention"]["threshold"] - 1e-9) == 1
            assert ensemble.answered(answer[None])[0] == given


@pytest.mark.parametrize("shape", [(1, 5, 2), (2, 5, 3), (5, 2)])
def test_other_members_or_classes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(EnsembleError, match="must have shape"):
        made_ensemble("soft").apply(np.full(shape, 0.5))


def test_values_that_are_no_probabilities_are_refused() -> None:
    with pytest.raises(EnsembleError, match="within 0"):
        made_ensemble("soft").apply([[[np.nan, 0.5]], [[0.5, 0.5]]])


def signed(values: dict[str, Any]) -> str:
    values.pop("sha256", None)
    checksum = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return json.dumps({**values, "sha256": checksum})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(format="other"), "is no ensemble of Clotline"),
        (lambda values: values.update(version=2), "has version 2"),
        (lambda values: values.update(method="vote"), "method 'vote'"),
        (lambda values: values.update(class_names=["CE"]), "class_names"),
        (lambda values: values["members"].pop(), "weights must be one number"),
        (lambda values: values["members"][0].update(more=1), "members must be"),
        (lambda values: values.update(weights=[0.5, 0.6]), "weights must be"),
        (lambda values: values.update(meta_learner=None), "meta_learner must be there"),
        (lambda values: values["meta_learner"].update(intercept=[1]), "meta_learner.intercept"),
        (lambda values: values["meta_learner"]["coefficients"].pop(), "meta_learner.coefficients"),
        (lambda values: values.update(temperature=0), "temperature must be"),
        (lambda values: values["abstention"].update(alpha=1.5), "abstention must be"),
        (lambda values: values.update(fitted_on_patients="all"), "fitted_on_patients"),
    ],
)
def test_a_definition_that_makes_no_sense_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "ensemble.json"
    made_ensemble("stack").save(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(signed(values))
    with pytest.raises(EnsembleError, match=message):
        Ensemble.load(path)


def test_an_altered_or_broken_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ensemble.json"
    made_ensemble("soft").save(path)
    text = path.read_text()
    path.write_text(text.replace("0.25", "0.35"))
    with pytest.raises(EnsembleError, match="was altered"):
        Ensemble.load(path)
    path.write_text(text[: len(text) // 2])
    with pytest.raises(EnsembleError, match="cannot be read as JSON"):
        Ensemble.load(path)
    with pytest.raises(EnsembleError, match="there is no such file"):
        Ensemble.load(tmp_path / "none.json")
