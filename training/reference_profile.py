"""The reference profile: what held-out patients' tiles look like and how they are answered, counted into histograms.

Serving counts the same quantities with the same edges (`slides.appearance`), so that drift is a distance of two
histograms (`docs/drift.md`). Only counts are kept: no patient, no slide and no pixel can be read from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import pydantic
from numpy.typing import NDArray

from slides.appearance import CONFIDENCE_EDGES, STATISTICS, appearance
from slides.decode import decode_tile

PROFILE_KEY = "reference_profile"
"""Of checkpoint.json; checkpoints of before have none."""
MOST_APPEARANCE_TILES = 4096
"""Held-out tiles that are decoded once more for their appearance, spread evenly over all."""

Item = TypeVar("Item")
Source = Literal["held_out", "comparison", "golden"]
Count = Annotated[int, pydantic.Field(ge=0)]


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class AnswerProfile(_Model):
    """Answers to tiles, or to slides.

    Attributes:
        count: how many there are.
        patients: whose they are.
        confidence: predicted class -> how many answers have a confidence in each bucket of CONFIDENCE_EDGES and above the last.
    """

    count: Annotated[int, pydantic.Field(ge=1)]
    patients: Annotated[int, pydantic.Field(ge=1)]
    confidence: dict[str, list[Count]]

    @property
    def together(self) -> list[int]:
        """The confidence of all answers, whatever they predict."""
        return [sum(column) for column in zip(*self.confidence.values(), strict=True)]


class AppearanceProfile(_Model):
    """How tiles look.

    Attributes:
        statistics: key of `slides.appearance.STATISTICS` -> how many tiles are in each of its buckets and above the last edge.
    """

    count: Annotated[int, pydantic.Field(ge=1)]
    patients: Annotated[int, pydantic.Field(ge=1)]
    statistics: dict[str, list[Count]]


class ReferenceProfile(_Model):
    """A profile.

    Attributes:
        source: "held_out": all held-out items at the end of training; "comparison": tiles that the exporter was given;
            "golden": the few golden tiles or bags, which are chosen so that classes take turns.
        tiles, slides: answers; None where there are none, or where the source says nothing of how often they occur.
        appearance: None where no tile was at hand.
    """

    version: Literal[1] = 1
    source: Source
    confidence_edges: list[float]
    appearance_edges: dict[str, list[float]]
    tiles: AnswerProfile | None = None
    slides: AnswerProfile | None = None
    appearance: AppearanceProfile | None = None

    @pydantic.model_validator(mode="after")
    def _adds_up(self) -> ReferenceProfile:
        histograms = [
            (f"{name}.confidence.{label}", counts, self.confidence_edges)
            for name in ("tiles", "slides")
            for label, counts in getattr(getattr(self, name), "confidence", {}).items()
        ]
        statistics = self.appearance.statistics if self.appearance is not None else {}
        if statistics.keys() - self.appearance_edges.keys():
            raise ValueError("appearance has statistics without edges")
        histograms += [
            (f"appearance.{name}", counts, self.appearance_edges[name]) for name, counts in statistics.items()
        ]
        wrong = [name for name, counts, edges in histograms if len(counts) != len(edges) + 1]
        for name, part in (("tiles", self.tiles), ("slides", self.slides)):
            if part is not None and sum(map(sum, part.confidence.values())) != part.count:
                wrong.append(name)
        if self.appearance is not None:
            wrong += [name for name, counts in statistics.items() if sum(counts) != self.appearance.count]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: the counts do not fit the edges, or not the total")
        return self

    @property
    def is_current(self) -> bool:
        """Whether its edges are those that serving counts with."""
        return tuple(self.confidence_edges) == CONFIDENCE_EDGES and all(
            tuple(self.appearance_edges.get(name, ())) == edges for name, edges in STATISTICS.items()
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON types."""
        return self.model_dump(mode="json")


def profile(
    source: Source,
    *,
    tiles: AnswerProfile | None = None,
    slides: AnswerProfile | None = None,
    appearance: AppearanceProfile | None = None,
) -> ReferenceProfile:
    """A profile with today's edges."""
    return ReferenceProfile(
        source=source,
        confidence_edges=list(CONFIDENCE_EDGES),
        appearance_edges={name: list(edges) for name, edges in STATISTICS.items()},
        tiles=tiles,
        slides=slides,
        appearance=appearance,
    )


def answers_of(
    probabilities_NK: NDArray[np.floating], patients_N: Sequence[str], class_names: Sequence[str]
) -> AnswerProfile:
    """The profile of N answers.

    Args:
        probabilities_NK: in the order of `class_names`.
        patients_N: whose tile or slide each is.
    """
    predicted_N = probabilities_NK.argmax(axis=1)
    confidence_N = probabilities_NK.max(axis=1)
    return AnswerProfile(
        count=len(patients_N),
        patients=len(set(patients_N)),
        confidence={
            name: histogram(confidence_N[predicted_N == index], CONFIDENCE_EDGES)
            for index, name in enumerate(class_names)
        },
    )


def appearance_of(tiles: Iterable[NDArray[np.uint8]], patients_N: Sequence[str]) -> AppearanceProfile:
    """The profile of N tiles, uint8 [S, S, 3] RGB as the network gets them."""
    values = [appearance(tile_HWC) for tile_HWC in tiles]
    return AppearanceProfile(
        count=len(values),
        patients=len(set(patients_N)),
        statistics={
            name: histogram(np.array([value[name] for value in values]), edges)
            for name, edges in STATISTICS.items()
        },
    )


def appearance_of_items(
    items: Sequence[tuple[str, Item]],
    encoded: Callable[[Item], bytes],
    size_px: int,
    most: int = MOST_APPEARANCE_TILES,
) -> AppearanceProfile:
    """The profile of encoded tiles: of `most` of them, spread evenly.

    Args:
        items: the patient of each tile, and what `encoded` needs to get it.
        size_px: of the network's input.
    """
    if len(items) > most:
        items = [items[round(place)] for place in np.linspace(0, len(items) - 1, most)]
    return appearance_of(
        (decode_tile(encoded(item), size_px) for _, item in items), [patient for patient, _ in items]
    )


def histogram(values_N: NDArray[np.floating], edges: Sequence[float]) -> list[int]:
    """How many values are in each bucket: above the edge before, and at most its own, as Prometheus counts."""
    places_N = np.searchsorted(np.asarray(edges), values_N.astype(np.float64), side="left")
    return np.bincount(places_N, minlength=len(edges) + 1).tolist()
