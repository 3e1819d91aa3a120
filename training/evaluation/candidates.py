"""Checkpoints as they come to an evaluation: by their manifests, grouped into models.

A model is what one set of scores is about: a single checkpoint, or the checkpoints of a cross-validation (the same
recipe, no held-out slide in common), whose answers are pooled: every slide is answered by the checkpoint that held it out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from slides.labels import SlideRecord
from slides.spec import ModelSpec
from training import checkpoint
from training.errors import EvaluationError

HELD_OUT = "held out"
NEW = "never seen"
TRAINED = "trained on"
WATCHED = "watched while training"
UNKNOWN = "unknown"
OPTIMISTIC = (TRAINED, WATCHED, UNKNOWN)
"""Answers about such patients may flatter the model."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A checkpoint that is to be evaluated; its weights are not loaded yet.

    Attributes:
        name: short and unlike the others of the evaluation.
        path: its directory.
        kind: "tile" or "slide", as `training.checkpoint.kind_of` says.
        manifest: checkpoint.json.
    """

    name: str
    path: Path
    kind: str
    spec: ModelSpec
    manifest: dict[str, Any]

    def _ids(self, key: str) -> frozenset[str] | None:
        value = self.manifest["data"].get(key)
        return None if value is None else frozenset(map(str, value))

    @property
    def held_out_slides(self) -> frozenset[str]:
        """image_ids that training held out."""
        return self._ids("held_out_slides") or frozenset()

    @property
    def held_out_patients(self) -> frozenset[str]:
        """patient_ids that training held out."""
        return self._ids("held_out_patients") or frozenset()

    @property
    def recipe_key(self) -> str:
        """Equal for checkpoints that differ in nothing but the fold they held out."""
        recipe = {
            key: value for key, value in self.manifest.get("recipe", {}).items() if key != "held_out_fold"
        }
        return json.dumps([self.kind, self.manifest["architecture"], recipe], sort_keys=True)

    def exposure(self, records: Iterable[SlideRecord]) -> dict[str, str]:
        """patient_id -> what training had to do with the patient: HELD_OUT, NEW, TRAINED, WATCHED or UNKNOWN.

        A manifest that does not name its training patients (older checkpoints) leaves it to a conclusion: where slides
        of its held-out list are among `records`, these are the data it was trained on, and whoever was not held out
        was trained on; where none is, nothing can be said.
        """
        trained, watched = self._ids("train_patients"), self._ids("validation_patients") or frozenset()
        records = list(records)
        same_data = any(record.image_id in self.held_out_slides for record in records)
        told: dict[str, str] = {}
        for record in records:
            patient_id = record.patient_id
            if trained is not None and patient_id in trained:
                told[patient_id] = TRAINED
            elif patient_id in watched:
                told[patient_id] = WATCHED
            elif patient_id in self.held_out_patients:
                told[patient_id] = HELD_OUT
            elif trained is not None:
                told[patient_id] = NEW
            else:
                told[patient_id] = TRAINED if same_data else UNKNOWN
        return told


@dataclasses.dataclass(frozen=True)
class Model:
    """What one set of scores is about.

    Attributes:
        candidates: one checkpoint, or those of a cross-validation, in the order of the command line.
    """

    name: str
    candidates: tuple[Candidate, ...]

    @property
    def first(self) -> Candidate:
        return self.candidates[0]


def read_candidates(paths: Sequence[Path]) -> list[Candidate]:
    """Read the manifests; weights are not touched.

    Raises:
        CheckpointError, CheckpointVersionError: as `training.checkpoint.read_manifest`.
        EvaluationError: the same checkpoint twice, or checkpoints whose classes differ.
    """
    problems = [
        f"{path} is given twice" for path in sorted({path for path in paths if paths.count(path) > 1})
    ]
    names = _short_names(paths)
    candidates = []
    for name, path in zip(names, paths, strict=True):
        manifest = checkpoint.read_manifest(path, kind=None)
        kind = str(manifest.get("kind", checkpoint.TILE))
        candidates.append(Candidate(name, path, kind, ModelSpec.from_dict(manifest["spec"]), manifest))
    first = candidates[0]
    problems += [
        f"{other.path} knows the classes {', '.join(other.spec.class_names)}, {first.path} knows "
        f"{', '.join(first.spec.class_names)}; they need the same ones in the same order"
        for other in candidates[1:]
        if other.spec.class_names != first.spec.class_names
    ]
    if problems:
        raise EvaluationError(f"{len(paths)} checkpoints", problems)
    return candidates


def models_of(candidates: Sequence[Candidate]) -> list[Model]:
    """Checkpoints of one recipe with no held-out slide in common become one model; all others stand for themselves."""
    groups: list[list[Candidate]] = []
    for candidate in candidates:
        for group in groups:
            alike = group[0].recipe_key == candidate.recipe_key
            apart = all(not (member.held_out_slides & candidate.held_out_slides) for member in group)
            if alike and apart and candidate.held_out_slides:
                group.append(candidate)
                break
        else:
            groups.append([candidate])
    names = [_group_name(group) for group in groups]
    return [
        Model(name if names.count(name) == 1 else f"{name} ({names[:number].count(name) + 1})", tuple(group))
        for number, (name, group) in enumerate(zip(names, groups, strict=True))
    ]


def _group_name(group: Sequence[Candidate]) -> str:
    if len(group) == 1:
        return group[0].name
    shortest, longest = min(member.name for member in group), max(member.name for member in group)
    alike = next(
        (place for place, pair in enumerate(zip(shortest, longest, strict=False)) if len(set(pair)) > 1), 0
    )
    stem = shortest[:alike].rstrip("-_./ 0123456789")
    return f"{stem or group[0].manifest['architecture']}, {len(group)} folds"


def _short_names(paths: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells them apart; training's "checkpoint" folder is named by its parent."""
    parts = [path.absolute().parts[1:] for path in paths]
    parts = [own[:-1] if len(own) > 1 and own[-1] == "checkpoint" else own for own in parts]
    longest = max(map(len, parts))
    for length in range(1, longest + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            break
    return names
