"""A release's reference profile, as what Prometheus compares with: parameter `clotline_reference` to samples.

    clotline_reference_share{model,quantity="class",class}              share of the reference's answers, 0..1
    clotline_reference_share{model,quantity="confidence",after,le}      after < confidence <= le, 0..1
    clotline_reference_share{model="tile_preprocess",quantity="appearance",statistic,after,le}
    clotline_reference_count{model,quantity}                            tiles, or slides, that the shares were taken of
    clotline_reference_patients{model,quantity}                         patients that those belong to

Shares are of single buckets, not cumulative, and each bucket names both of its edges ("-Inf" and "+Inf" at the ends):
so a query gets the same bucket of a served histogram by one subtraction (docker/prometheus/rules/drift.yml). Buckets
are unions of the served histogram's. What tiles look like does not depend on the model that answers: served tiles are
counted by `tile_preprocess`, so the reference has that name too, and only one public model of a release carries it.

The parameter is JSON, written by the exporter (`exporters.reference_profile`):

    {"version": 1,
     "class":      {"count": 960, "patients": 60, "shares": {"CE": 0.6, "LAA": 0.4}},
     "confidence": {"count": 960, "patients": 60, "buckets": [["0.65", 0.35], ["0.9", 0.4], ["+Inf", 0.25]]},
     "appearance": {"count": 960, "patients": 60, "buckets": {"brightness": [["0.6", 0.5], ["+Inf", 0.5]], ...}}}

Each of the three may be missing.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

PARAMETER = "clotline_reference"
VERSION = 1
APPEARANCE_MODEL = "tile_preprocess"
SHARE, COUNT, PATIENTS = "clotline_reference_share", "clotline_reference_count", "clotline_reference_patients"
QUANTITIES = ("class", "confidence", "appearance")

Sample = tuple[str, Mapping[str, str], float]


def reference_samples(model: str, parameters: Mapping[str, str]) -> list[tuple[str, dict[str, str], float]]:
    """What a public model's reference profile says.

    Args:
        model: public name, without a release's `__r<N>`.
        parameters: of the model's configuration.

    Returns:
        (metric, labels, value); none without a profile, or with one that makes no sense, which is said once on
        standard error.
    """
    text = parameters.get(PARAMETER)
    return [] if text is None else [(name, dict(labels), value) for name, labels, value in _read(model, text)]


def without_repeats(samples_of_models: Iterable[Sequence[Sample]]) -> list[Sample]:
    """All samples of several models, but of each metric, model and quantity only those of the first who tells of it.

    A repository into which tile and slide models were exported one after another has two that tell what tiles look like.
    """
    kept: list[Sample] = []
    told: set[tuple[str, str | None, str | None]] = set()
    for samples in samples_of_models:
        subjects = [(name, labels.get("model"), labels.get("quantity")) for name, labels, _ in samples]
        kept += [sample for sample, subject in zip(samples, subjects, strict=True) if subject not in told]
        told.update(subjects)
    return kept


@functools.lru_cache(maxsize=64)
def _read(model: str, text: str) -> tuple[Sample, ...]:
    try:
        return tuple(_samples(model, json.loads(text)))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        print(
            f"serving: {model}: parameter {PARAMETER} is no reference profile, drift of this model is not watched "
            f"({type(error).__name__}: {str(error)[:200]!r}); export the release again",
            file=sys.stderr,
            flush=True,
        )
        return ()


def _samples(model: str, profile: Mapping[str, Any]) -> Iterator[Sample]:
    if profile["version"] != VERSION:
        raise ValueError(f"version {profile['version']!r}, this Clotline reads {VERSION}")
    for quantity in QUANTITIES:
        if quantity not in profile:
            continue
        part = profile[quantity]
        name = APPEARANCE_MODEL if quantity == "appearance" else model
        for metric, key in ((COUNT, "count"), (PATIENTS, "patients")):
            yield metric, {"model": name, "quantity": quantity}, _above_0(part[key], f"{quantity}.{key}")
        if quantity == "class":
            for label, share in _whole(part["shares"], "class.shares").items():
                yield SHARE, _labels(name, quantity, label=str(label)), share
        elif quantity == "confidence":
            yield from _histogram(name, quantity, "", part["buckets"])
        else:
            for statistic, buckets in part["buckets"].items():
                yield from _histogram(name, quantity, str(statistic), buckets)


def _histogram(model: str, quantity: str, statistic: str, buckets: list[Any]) -> Iterator[Sample]:
    edges = [str(edge) for edge, _ in buckets]
    numbers = [-math.inf, *map(float, edges)]
    if edges[-1:] != ["+Inf"] or sorted(set(numbers)) != numbers:
        raise ValueError(f"edges of {quantity} {statistic} must rise and end with +Inf, not {edges}")
    shares = _whole(dict(zip(edges, (share for _, share in buckets), strict=True)), f"{quantity} {statistic}")
    for after, (edge, share) in zip(["-Inf", *edges], shares.items(), strict=False):
        yield SHARE, _labels(model, quantity, statistic=statistic, after=after, le=edge), share


def _labels(
    model: str, quantity: str, *, label: str = "", statistic: str = "", after: str = "", le: str = ""
) -> dict[str, str]:
    values = {"model": model, "quantity": quantity, "class": label}
    return {**values, "statistic": statistic, "after": after, "le": le}


def _whole(shares: Mapping[str, Any], where: str) -> dict[str, float]:
    """Shares that are numbers from 0 to 1 and make up 1."""
    found = {str(key): float(value) for key, value in shares.items()}
    if not all(0 <= value <= 1 for value in found.values()) or abs(sum(found.values()) - 1) > 1e-3:
        raise ValueError(f"shares of {where} must be from 0 to 1 with sum 1, not {list(found.values())}")
    return found


def _above_0(value: Any, where: str) -> float:
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{where} must be above 0, not {value!r}")
    return float(value)
