"""Errors of the package `slides`.

    SlidesError
     +- SpecError               a ModelSpec that cannot be (also a ValueError)
     +- LabelsError             train.csv and its slides do not fit together; `.problems` lists every one
     +- AggregationError        probabilities that cannot be averaged (also a ValueError)
     +- SlideFileError          a slide that is missing, truncated, empty, no image, or of no use
     |   +- ResolutionUnknownError   the file does not say how many micrometres a pixel is
     |   +- NoTissueError            nothing but glass (or too little tissue) on the slide
     +- DemoError               demo slides that cannot be made as asked
     +- TileDecodeError         bytes that are no tile; `.reason` is a short slug (also a ValueError)

Whoever reads one of these messages learns what is wrong, with which value, where, and what would work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


class SlidesError(Exception):
    """Root of the errors of this package."""


class SpecError(SlidesError, ValueError):
    """A model specification with impossible, unknown or missing entries; the message lists all of them."""


class LabelsError(SlidesError):
    """Labels and slides do not fit together.

    Attributes:
        problems: one sentence for each problem found, in reading order.
    """

    def __init__(self, source: str, problems: Iterable[str]) -> None:
        self.source = source
        self.problems: tuple[str, ...] = tuple(problems)
        count = len(self.problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{source}: {count} problem{'s' if count != 1 else ''}\n{lines}")

    def __reduce__(self) -> tuple[type[LabelsError], tuple[str, tuple[str, ...]]]:
        return (type(self), (self.source, self.problems))


class AggregationError(SlidesError, ValueError):
    """Probabilities that cannot be averaged: wrong shape, none at all, or not finite."""


class SlideFileError(SlidesError):
    """A slide file that is missing, truncated, empty, not an image, or not readable in bounded memory."""


class ResolutionUnknownError(SlideFileError):
    """The slide does not state its resolution and none was given."""


class NoTissueError(SlideFileError):
    """No tile of the slide has the wanted share of tissue."""


class DemoError(SlidesError):
    """Demo slides that cannot be made: impossible numbers, or a folder that is taken or not writable."""


class TileDecodeError(SlidesError, ValueError):
    """Bytes that are no usable tile.

    Attributes:
        reason: one of REASONS. Stable: callers may count by it.
    """

    REASONS: ClassVar = (
        "empty",
        "too_many_bytes",
        "not_an_image",
        "unsupported_format",
        "too_small",
        "too_many_pixels",
        "too_many_scans",
        "truncated",
        "damaged",
    )

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        self.message = message
        super().__init__(message)

    def __reduce__(self) -> tuple[type[TileDecodeError], tuple[str, str]]:
        return (type(self), (self.reason, self.message))
