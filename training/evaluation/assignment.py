"""Which checkpoint answers about which slide, and whether it had learnt from the patient."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from slides.labels import SlideRecord
from training.errors import EvaluationError
from training.evaluation.candidates import HELD_OUT, NEW, OPTIMISTIC, Candidate, Model

Split = Literal["held-out", "all"]
_WORST_FIRST = (*OPTIMISTIC, NEW, HELD_OUT)


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Who answers what.

    Attributes:
        records: slides that every model answers, in the order of the labels.
        answering: model name -> image_id -> the checkpoints whose answers are averaged; mostly one.
        exposure: model name -> patient_id -> the worst thing that an answering checkpoint had to do with the patient.
        notes: what a reader must know about the choice, one sentence each.
    """

    records: tuple[SlideRecord, ...]
    answering: Mapping[str, Mapping[str, tuple[Candidate, ...]]]
    exposure: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...]

    def without(self, bad: Collection[str]) -> Assignment:
        """The same, less the slides in `bad`, of which it is known that they give no tile."""
        return dataclasses.replace(
            self, records=tuple(record for record in self.records if record.image_id not in bad)
        )

    def exposed_patients(self) -> dict[str, str]:
        """patient_id -> exposure, for patients of which an answer of some model may be too good."""
        found: dict[str, str] = {}
        for of_patient in self.exposure.values():
            for patient_id, exposure in of_patient.items():
                if exposure in OPTIMISTIC:
                    found[patient_id] = _worst((exposure, found.get(patient_id, HELD_OUT)))
        return dict(sorted(found.items()))


def assign(models: Sequence[Model], records: Sequence[SlideRecord], split: Split) -> Assignment:
    """Decide who answers what.

    Args:
        records: all slides of the data.
        split: "held-out": slides of patients that a checkpoint held out, answered by it; "all": every slide, answered
            by the checkpoints that held it out, else by those that never saw its patient, else by all of the model.

    Raises:
        EvaluationError: nothing is left to evaluate, or the models have no slide in common.
    """
    answering: dict[str, dict[str, tuple[Candidate, ...]]] = {}
    exposure: dict[str, dict[str, str]] = {}
    for model in models:
        told = {candidate.name: candidate.exposure(records) for candidate in model.candidates}
        answering[model.name], exposure[model.name] = {}, {}
        for record in records:
            chosen = _answering(model, record, told, split)
            if chosen:
                answering[model.name][record.image_id] = chosen
                had = [told[candidate.name][record.patient_id] for candidate in chosen]
                before = exposure[model.name].get(record.patient_id, HELD_OUT)
                exposure[model.name][record.patient_id] = _worst([*had, before])
    problems = [_nothing_held_out(model) for model in models if not answering[model.name]]
    if problems:
        raise EvaluationError(f"evaluation of {len(records)} slides", problems)
    common = set.intersection(*(set(of_model) for of_model in answering.values()))
    if not common:
        lines = [f"{model.name} answers {len(answering[model.name])} slides" for model in models]
        raise EvaluationError(
            "models to compare",
            [*lines, "they have no slide in common; evaluate them one by one, or use --split all"],
        )
    kept = tuple(record for record in records if record.image_id in common)
    patients = {record.patient_id for record in kept}
    return Assignment(
        kept,
        {
            name: {key: value for key, value in slides.items() if key in common}
            for name, slides in answering.items()
        },
        {
            name: {key: value for key, value in told.items() if key in patients}
            for name, told in exposure.items()
        },
        tuple(_notes(models, records, answering, len(common), split)),
    )


def _answering(
    model: Model, record: SlideRecord, told: Mapping[str, Mapping[str, str]], split: Split
) -> tuple[Candidate, ...]:
    """By what each checkpoint says of the patient; `held_out` comes from the manifest, whatever else it says."""
    held_out = tuple(one for one in model.candidates if record.patient_id in one.held_out_patients)
    if held_out or split == "held-out":
        return held_out
    new = tuple(one for one in model.candidates if told[one.name][record.patient_id] == NEW)
    return new or model.candidates


def _nothing_held_out(model: Model) -> str:
    held_out = sorted(set().union(*(candidate.held_out_patients for candidate in model.candidates)))
    if not held_out:
        return f"{model.name}: its checkpoint names no held-out patients; with --split all every slide is evaluated"
    return (
        f"{model.name}: none of its {len(held_out)} held-out patients ({', '.join(held_out[:3])}, ...) is in the data; "
        "for data from elsewhere use --split all"
    )


def _notes(
    models: Sequence[Model],
    records: Sequence[SlideRecord],
    answering: Mapping[str, Mapping[str, object]],
    common: int,
    split: Split,
) -> list[str]:
    notes = []
    present = {record.image_id for record in records}
    for model in models:
        held_out = set().union(*(candidate.held_out_slides for candidate in model.candidates))
        absent = sorted(held_out - present)
        if absent and split == "held-out":
            notes.append(
                f"{model.name}: {len(absent)} of {len(held_out)} slides that it held out are not in the data "
                f"({', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''})."
            )
        if len(answering[model.name]) > common:
            notes.append(
                f"{model.name} could answer {len(answering[model.name])} slides; it is compared on the {common} that all "
                "models answer."
            )
    return notes


def _worst(exposures: Sequence[str]) -> str:
    return min(exposures, key=_WORST_FIRST.index)
