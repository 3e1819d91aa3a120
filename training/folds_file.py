"""Who is held out when: the folds as a value, and as one JSON file (`training.folds` makes them)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slides.labels import SlideRecord
from training.atomic_file import write_text
from training.errors import DataError, FoldsError

FORMAT = "clotline.folds"
VERSION = 1
STRATIFIED = "stratified_group"
BY_CENTRE = "leave_one_centre_out"
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Patient:
    """What the folds know of a patient.

    Attributes:
        fold: the one fold in which all of the patient's slides are held out.
        center_ids: sorted; exactly one where folds are centres.
        image_ids: sorted.
    """

    fold: int
    label: str
    center_ids: tuple[str, ...]
    image_ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Folds:
    """Who is held out when.

    Attributes:
        method: "stratified_group" (scikit-learn's StratifiedGroupKFold) or "leave_one_centre_out".
        folds: how many there are.
        seed: of the shuffle; None for leave-one-centre-out, which has no chance in it.
        patients: patient_id -> Patient, in order of patient_id.
        centres: center_id of each fold for leave-one-centre-out, else empty.
    """

    method: str
    folds: int
    seed: int | None
    patients: Mapping[str, Patient]
    centres: tuple[str, ...] = ()

    @property
    def fold_of_patient(self) -> dict[str, int]:
        """patient_id -> 0..folds-1."""
        return {patient_id: patient.fold for patient_id, patient in self.patients.items()}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the patients, sorted."""
        return tuple(sorted({patient.label for patient in self.patients.values()}))

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that the folds say; the same folds give the same fingerprint."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """JSON types, as in the file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "method": self.method,
            "folds": self.folds,
            "seed": self.seed,
            "centres": list(self.centres),
            "patients": {
                patient_id: {
                    "fold": patient.fold,
                    "label": patient.label,
                    "center_ids": list(patient.center_ids),
                    "image_ids": list(patient.image_ids),
                }
                for patient_id, patient in self.patients.items()
            },
        }

    def save(self, path: Path | str) -> None:
        """Write the file aside and rename it into place; one line a patient."""
        values = self.as_dict()
        patients = [
            f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in values.pop("patients").items()
        ]
        head = json.dumps(values, indent=1).removesuffix("\n}")
        text = f'{head},\n "patients": {{\n' + ",\n".join(patients) + "\n }\n}\n"
        write_text(path, text)

    @classmethod
    def load(cls, path: Path | str) -> Folds:
        """Read a folds file.

        Raises:
            FoldsError: it is missing, not JSON, of another format or version, or damaged; every problem is listed.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FoldsError(
                str(path), ["there is no such file; `python -m training folds` writes one"]
            ) from None
        except (OSError, ValueError) as error:
            raise FoldsError(str(path), [f"cannot be read as JSON: {error}"]) from error
        return _from_dict(values, str(path))

    def check(self, records: Iterable[SlideRecord], *, unusable: Collection[str] = ()) -> None:
        """Raise FoldsError, with names, where the folds were made of other patients than those of `records`.

        A patient of `records` that the folds do not know, or know with another class, is a problem; so is a patient of
        the folds that `records` lack, unless all slides of that patient are in `unusable` (image_ids that could not
        be read). More or fewer slides of a known patient are none.
        """
        label_of = labels_of_patients(records)
        known = self.patients
        strangers = sorted(label_of.keys() - known.keys())
        changed = sorted(key for key in label_of.keys() & known.keys() if label_of[key] != known[key].label)
        absent = sorted(
            key for key in known.keys() - label_of.keys() if not set(known[key].image_ids) <= set(unusable)
        )
        problems = []
        if strangers:
            problems.append(f"{_named(strangers)} of the data {_are(strangers)} not in the folds")
        if absent:
            problems.append(f"{_named(absent)} of the folds {_are(absent)} not in the data")
        if changed:
            was = ", ".join(f"{key} {known[key].label} -> {label_of[key]}" for key in changed[:_SHOWN])
            problems.append(f"{_named(changed)} changed class since the folds were made ({was})")
        if problems:
            raise FoldsError(
                "folds of other data", [*problems, "make new folds: python -m training folds ..."]
            )


def labels_of_patients(records: Iterable[SlideRecord]) -> dict[str, str]:
    label_of: dict[str, str] = {}
    problems = []
    for record in records:
        first = label_of.setdefault(record.patient_id, record.label)
        if first != record.label:
            problems.append(f"patient {record.patient_id} is {first} and {record.label}")
    if problems:
        raise DataError("labels of patients", sorted(set(problems)))
    return label_of


def _from_dict(values: Any, source: str) -> Folds:
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise FoldsError(source, [f"is no folds file of Clotline (its format must be {FORMAT!r})"])
    if values.get("version") != VERSION:
        raise FoldsError(
            source,
            [f"has version {values.get('version')!r}, this Clotline reads version {VERSION}; make it anew"],
        )
    method: Any = values.get("method")
    folds: Any = values.get("folds")
    seed: Any = values.get("seed")
    centres: Any = values.get("centres")
    patients: Any = values.get("patients")
    problems: list[str] = []
    folds = folds if _is_whole(folds) else 0
    if method not in (STRATIFIED, BY_CENTRE):
        problems.append(f"method {method!r} is none of {STRATIFIED}, {BY_CENTRE}")
    if folds < 2:
        problems.append(f"folds must be a whole number >= 2, not {values.get('folds')!r}")
    if seed is not None and not _is_whole(seed):
        problems.append(f"seed must be a whole number or null, not {seed!r}")
    if not _are_texts(centres) or (method == BY_CENTRE and len(centres) != folds):
        problems.append("centres must be one name a fold for leave-one-centre-out, else empty")
    if not isinstance(patients, dict) or not patients:
        problems.append("patients must be a table with at least one patient")
        patients = {}
    read = {}
    for patient_id, entry in patients.items():
        entry = entry if isinstance(entry, dict) else {}
        fold: Any = entry.get("fold")
        label: Any = entry.get("label")
        if not _is_whole(fold) or not 0 <= fold < folds:
            problems.append(f"patient {patient_id}: fold {fold!r} is not one of 0..{folds - 1}")
        elif not isinstance(label, str) or not label:
            problems.append(f"patient {patient_id}: label is missing")
        elif not (_are_texts(entry.get("center_ids")) and _are_texts(entry.get("image_ids"))):
            problems.append(f"patient {patient_id}: center_ids and image_ids must be lists of names")
        else:
            read[patient_id] = Patient(fold, label, tuple(entry["center_ids"]), tuple(entry["image_ids"]))
    owner: dict[str, str] = {}
    for patient_id, patient in read.items():
        for image_id in patient.image_ids:
            if owner.setdefault(image_id, patient_id) != patient_id:
                problems.append(f"slide {image_id} belongs to patients {owner[image_id]} and {patient_id}")
    if problems:
        raise FoldsError(source, problems)
    return Folds(str(method), int(folds), seed, read, tuple(centres))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _named(keys: Sequence[str]) -> str:
    more = f", ... ({len(keys)} in all)" if len(keys) > _SHOWN else ""
    return f"patient{'s' if len(keys) != 1 else ''} {', '.join(keys[:_SHOWN])}{more}"


def _are(keys: Sequence[str]) -> str:
    return "is" if len(keys) == 1 else "are"
