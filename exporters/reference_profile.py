"""A release's reference profile: taken from the checkpoint, or made of the exporter's tiles; and the parameter that
serving reads it from.

Prometheus compares shares of buckets (`docs/drift.md`). Buckets with few tiles make noise, so neighbours are joined until
each holds about LEAST_SHARE of the reference and LEAST_PATIENTS patients' worth of it. What cannot be cut into two such
buckets has no reference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pydantic

from exporters.comparison_tiles import ComparisonTiles
from exporters.slide.parity import Reference
from slides.labels import patient_of
from training.reference_profile import (
    PROFILE_KEY,
    AnswerProfile,
    AppearanceProfile,
    ReferenceProfile,
    answers_of,
    appearance_of,
    profile,
)

PARAMETER = "clotline_reference"
VERSION = 1
LEAST_SHARE = 0.1
"""Deciles, the usual number of buckets of a PSI (Siddiqi, "Credit Risk Scorecards", 2006)."""
LEAST_PATIENTS = 5
"""The least expected count of a chi-squared statistic's cells (Cochran 1954), of which PSI is a relative."""
_DIGITS = 6


def of_manifest(manifest: Mapping[str, Any]) -> ReferenceProfile | None:
    """What training left in checkpoint.json; None where it left nothing, or counted with other edges than serving does."""
    try:
        found = ReferenceProfile.model_validate(manifest.get(PROFILE_KEY))
    except pydantic.ValidationError:
        return None
    return found if found.is_current else None


def of_tiles(
    tiles: ComparisonTiles, probabilities_NK: np.ndarray, *, golden: bool
) -> ReferenceProfile | None:
    """The profile of the tiles that a tile checkpoint is compared on.

    Args:
        probabilities_NK: what PyTorch answers to them.
        golden: they are the checkpoint's golden tiles, among which classes take turns; so answers are left out.

    Returns:
        None where a tile's patient is not known: how many patients a profile is made of decides what it is good for.
    """
    patients_N = [
        patient or (image and patient_of(image))
        for patient, image in zip(tiles.truth.patients_N, tiles.truth.images_N, strict=True)
    ]
    known_N = [patient for patient in patients_N if patient]
    if len(known_N) < len(patients_N):
        return None
    appearance = appearance_of(tiles.tiles_NHWC, known_N)
    if golden:
        return profile("golden", appearance=appearance)
    answers = answers_of(probabilities_NK, known_N, tiles.truth.class_names)
    return profile("comparison", tiles=answers, appearance=appearance)


def of_bags(expected: Reference, class_names: Sequence[str], *, golden: bool) -> ReferenceProfile:
    """The profile of the bags that a slide model is compared on; golden ones as in `of_tiles`."""
    patients_B = [patient_of(bag.image_id) for bag in expected.bags]
    patients_N = [
        patient
        for bag, patient in enumerate(patients_B)
        for _ in range(expected.starts[bag + 1] - expected.starts[bag])
    ]
    appearance = appearance_of(expected.tiles_NHWC, patients_N)
    if golden:
        return profile("golden", appearance=appearance)
    answers_BK = np.stack([answer["probabilities"] for answer in expected.answers])
    return profile(
        "comparison", slides=answers_of(answers_BK, patients_B, class_names), appearance=appearance
    )


def parameter_of(
    found: ReferenceProfile | None, answers_for: Literal["tiles", "slides"], *, with_appearance: bool
) -> dict[str, str]:
    """`{PARAMETER: JSON}` for a public model's configuration; nothing where there is nothing to compare with.

    Args:
        answers_for: what the model is asked for.
        with_appearance: for one public model of a release; tiles look the same to all.
    """
    if found is None:
        return {}
    told: dict[str, Any] = {}
    answers = found.tiles if answers_for == "tiles" else found.slides
    if answers is not None:
        told |= _answers(answers, found.confidence_edges)
    if with_appearance and found.appearance is not None:
        told |= _appearance(found.appearance, found.appearance_edges)
    if not told:
        return {}
    return {PARAMETER: json.dumps({"version": VERSION, **told}, sort_keys=True, separators=(",", ":"))}


def joined(counts: Sequence[int], edges: Sequence[float], patients: int) -> list[tuple[str, float]]:
    """Upper edge (as serving writes it) and share of each bucket, neighbours joined; only one: no reference.

    Of the edges those are kept that are nearest to equal shares, unless a bucket would hold less than half of one.

    Args:
        counts: of the buckets of `edges`, and above the last.
        patients: whose they are.
    """
    reached = np.cumsum(counts) / sum(counts)
    buckets = int(1 / max(LEAST_SHARE, LEAST_PATIENTS / patients))
    found: list[tuple[str, float]] = []
    before = 0.0
    for bucket in range(1, buckets):
        place = int(np.abs(reached[:-1] - bucket / buckets).argmin())
        share = float(reached[place]) - before
        if min(share, 1 - reached[place]) >= 0.5 / buckets:
            found.append((str(edges[place]), round(share, _DIGITS)))
            before = float(reached[place])
    return [*found, ("+Inf", round(1 - before, _DIGITS))]


def _answers(answers: AnswerProfile, edges: Sequence[float]) -> dict[str, Any]:
    size = {"count": answers.count, "patients": answers.patients}
    told: dict[str, Any] = {}
    if answers.patients >= 2 * LEAST_PATIENTS:
        shares = {
            name: round(sum(counts_of) / answers.count, _DIGITS)
            for name, counts_of in answers.confidence.items()
        }
        told["class"] = {**size, "shares": shares}
    buckets = joined(answers.together, edges, answers.patients)
    if len(buckets) > 1:
        told["confidence"] = {**size, "buckets": buckets}
    return told


def _appearance(appearance: AppearanceProfile, edges: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    buckets = {
        name: joined(counts, edges[name], appearance.patients)
        for name, counts in appearance.statistics.items()
    }
    kept = {name: of_statistic for name, of_statistic in buckets.items() if len(of_statistic) > 1}
    if not kept:
        return {}
    size = {"count": appearance.count, "patients": appearance.patients}
    return {"appearance": {**size, "buckets": kept}}
