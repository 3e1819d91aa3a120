"""ensemble.json: all that is needed to answer as the ensemble does, once its members have answered."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.atomic_file import write_text
from training.calibration import SMALLEST_PROBABILITY
from training.ensembles import conformal
from training.ensembles.combination import METHODS, Combination
from training.ensembles.stacking import MetaLearner
from training.errors import EnsembleError

FORMAT = "clotline.ensemble"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Member:
    """One network of the ensemble.

    Attributes:
        name: how it was called when the ensemble was made; a file name in most cases.
        table_sha256: of the table of its out-of-fold predictions.
        checkpoint: where its checkpoint lies, None where that was not said.
    """

    name: str
    table_sha256: str
    checkpoint: str | None = None


@dataclasses.dataclass(frozen=True)
class Abstention:
    """Answers are held back where not exactly one class has a probability >= 1 - threshold (`ensembles.conformal`).

    Attributes:
        alpha: the share of patients whose set of classes may miss the truth.
        threshold: 0..1, largest 1 - p of a class in the set.
        patients: how many the threshold was found from.
    """

    alpha: float
    threshold: float
    patients: int


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """A definition, as in ensemble.json.

    Attributes:
        class_names: the order of K wherever arrays have it.
        members: the order of M.
        combination: method, weights, meta-learner, temperature.
        abstention: None where every slide gets an answer.
        fitted_on_patients: sorted; empty where nothing was fitted. Scores on these patients are optimistic.
        scores: those that the command printed, for a person to read.
    """

    class_names: tuple[str, ...]
    members: tuple[Member, ...]
    combination: Combination
    abstention: Abstention | None = None
    fitted_on_patients: tuple[str, ...] = ()
    scores: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def apply(self, probabilities_MNK: ArrayLike) -> NDArray[np.float64]:
        """The ensemble's probabilities.

        Args:
            probabilities_MNK: what each member says of N slides or patients, classes in the order of `class_names`.

        Returns:
            float64 [N, K].

        Raises:
            EnsembleError: another number of members or classes, or values that are no probabilities.
        """
        values_MNK = np.asarray(probabilities_MNK, dtype=np.float64)
        wanted = (len(self.members), len(self.class_names))
        if values_MNK.ndim != 3 or (values_MNK.shape[0], values_MNK.shape[2]) != wanted:
            raise EnsembleError(
                "probabilities",
                [f"must have shape [{wanted[0]}, N, {wanted[1]}], not {list(values_MNK.shape)}"],
            )
        if not (np.isfinite(values_MNK).all() and (values_MNK >= 0).all() and (values_MNK <= 1 + 1e-6).all()):
            raise EnsembleError("probabilities", ["must be numbers within 0..1"])
        return self.combination.apply(values_MNK)

    def answered(self, probabilities_NK: ArrayLike) -> NDArray[np.bool_]:
        """Which rows of the ensemble's probabilities are answered, bool [N]; all of them without abstention."""
        if self.abstention is None:
            return np.ones(len(np.asarray(probabilities_NK)), dtype=bool)
        return conformal.answered(probabilities_NK, self.abstention.threshold)

    def as_dict(self) -> dict[str, Any]:
        """JSON types, as in the file but for its checksum."""
        join = self.combination
        meta = None
        if join.meta is not None:
            meta = {
                "kind": join.meta.kind,
                "smallest_probability": SMALLEST_PROBABILITY,
                "coefficients": join.meta.coefficients_KF.tolist(),
                "intercept": join.meta.intercept_K.tolist(),
            }
        return {
            "format": FORMAT,
            "version": VERSION,
            "method": join.method,
            "class_names": list(self.class_names),
            "members": [dataclasses.asdict(member) for member in self.members],
            "weights": join.weights_M.tolist(),
            "meta_learner": meta,
            "temperature": join.temperature,
            "abstention": dataclasses.asdict(self.abstention) if self.abstention else None,
            "fitted_on_patients": list(self.fitted_on_patients),
            "scores": dict(self.scores),
        }

    def save(self, path: Path | str) -> None:
        """Write the file aside and rename it into place."""
        values = self.as_dict()
        text = json.dumps({**values, "sha256": _checksum(values)}, indent=1, allow_nan=False) + "\n"
        write_text(path, text)

    @classmethod
    def load(cls, path: Path | str) -> Ensemble:
        """Read a definition.

        Raises:
            EnsembleError: it is missing, not JSON, of another format or version, altered, or does not make sense;
                every problem is listed.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise EnsembleError(
                str(path), ["there is no such file; `python -m training ensemble` writes one"]
            ) from None
        except (OSError, ValueError) as error:
            raise EnsembleError(str(path), [f"cannot be read as JSON: {error}"]) from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise EnsembleError(str(path), [f"is no ensemble of Clotline (its format must be {FORMAT!r})"])
        if values.get("version") != VERSION:
            raise EnsembleError(
                str(path), [f"has version {values.get('version')!r}, this Clotline reads version {VERSION}"]
            )
        if values.pop("sha256", None) != _checksum(values):
            raise EnsembleError(
                str(path), ["was altered after it was written (its sha256 differs); make it anew"]
            )
        problems = list(_problems(values))
        if problems:
            raise EnsembleError(str(path), problems)
        return _from_dict(values)


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _problems(values: Mapping[str, Any]) -> list[str]:
    problems = []
    if values.get("method") not in METHODS:
        problems.append(f"method {values.get('method')!r} is none of {', '.join(METHODS)}")
    names = values.get("class_names")
    if not isinstance(names, list) or len(names) < 2 or len(set(map(str, names))) < len(names):
        problems.append(f"class_names must be at least two different names, not {names!r:.80}")
        names = []
    members = values.get("members")
    if not isinstance(members, list) or not members or not all(_is_member(entry) for entry in members):
        problems.append("members must be a list of {name, table_sha256, checkpoint}, at least one")
        members = []
    weights = values.get("weights")
    if (
        not _has_shape(weights, (len(members),))
        or abs(sum(weights or []) - 1) > 1e-6
        or min(weights or [0]) < 0
    ):
        problems.append("weights must be one number >= 0 a member with sum 1")
    meta = values.get("meta_learner")
    if (values.get("method") == "stack") != isinstance(meta, dict):
        problems.append("meta_learner must be there for the method stack, and only then")
    elif isinstance(meta, dict):
        if not _has_shape(meta.get("coefficients"), (len(names), len(names) * len(members))):
            problems.append("meta_learner.coefficients must be [classes][members * classes] numbers")
        if not _has_shape(meta.get("intercept"), (len(names),)):
            problems.append("meta_learner.intercept must be one number a class")
        if meta.get("smallest_probability") != SMALLEST_PROBABILITY:
            problems.append(f"meta_learner.smallest_probability must be {SMALLEST_PROBABILITY:g}")
    if not _is_number(values.get("temperature")) or not values["temperature"] > 0:
        problems.append(f"temperature must be a number > 0, not {values.get('temperature')!r}")
    abstention = values.get("abstention")
    if abstention is not None and not (
        isinstance(abstention, dict)
        and set(abstention) == {"alpha", "threshold", "patients"}
        and all(map(_is_number, abstention.values()))
        and 0 < abstention["alpha"] < 1
        and 0 <= abstention["threshold"] <= 1
    ):
        problems.append("abstention must be null, or alpha within 0..1, threshold within 0..1 and patients")
    patients = values.get("fitted_on_patients")
    if not isinstance(patients, list) or not all(isinstance(entry, str) for entry in patients):
        problems.append("fitted_on_patients must be a list of patient ids")
    if not isinstance(values.get("scores"), dict):
        problems.append("scores must be a table")
    return problems


def _from_dict(values: Mapping[str, Any]) -> Ensemble:
    meta = values["meta_learner"]
    combination = Combination(
        method=values["method"],
        weights_M=np.array(values["weights"], dtype=np.float64),
        meta=MetaLearner(
            str(meta.get("kind")),
            np.array(meta["coefficients"], dtype=np.float64),
            np.array(meta["intercept"], dtype=np.float64),
        )
        if meta
        else None,
        temperature=float(values["temperature"]),
    )
    return Ensemble(
        class_names=tuple(map(str, values["class_names"])),
        members=tuple(Member(**entry) for entry in values["members"]),
        combination=combination,
        abstention=Abstention(**values["abstention"]) if values["abstention"] else None,
        fitted_on_patients=tuple(values["fitted_on_patients"]),
        scores=values["scores"],
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_member(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and set(entry) == {"name", "table_sha256", "checkpoint"}
        and isinstance(entry["name"], str)
        and isinstance(entry["table_sha256"], str)
        and isinstance(entry["checkpoint"], (str, type(None)))
    )


def _has_shape(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether nested lists of finite numbers have this shape."""
    if not shape:
        return _is_number(value)
    return (
        isinstance(value, list)
        and len(value) == shape[0]
        and all(_has_shape(entry, shape[1:]) for entry in value)
    )
