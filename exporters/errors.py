"""Errors of the exporters.

ExportError
 +-- FormatError          a format's name is unknown, given twice or missing; a number is out of range
      +-- UnavailableError     the format cannot be built on this machine; says what it needs and how to get it
 +-- GraphError           the network could not be written in a format, or the file cannot be opened again
      +-- DamagedArtifactError the file is damaged, incomplete or was written by another version of its runtime
      +-- PrecisionError       the file does not compute in the precision that was asked for
 +-- GoldenTilesError     the parity gate has no usable tiles, or the calibration has none
 +-- ParityError          the written file does not answer as PyTorch does; nothing was published
      +-- RefusedError         it does, within tolerance, but is not faster and smaller than FP32
      +-- ServedError          a tritonserver does not load it, or does not answer as PyTorch does
 +-- RepositoryError      the repository cannot be read, written or extended; it is as it was before
      +-- RepositoryBusyError   another export holds the repository
 +-- ReleaseError         a release cannot be read or written; lists every problem
      +-- ReleaseVersionError   it is of a format or version that this code does not read
      +-- ReleaseExistsError    there is something at its place already
      +-- ReleaseBusyError      another export is writing it

Those that are a ValueError too are the fault of what was asked for: exit code 2. All others have exit code 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exporters.acceptance import Speed
    from exporters.parity import Parity


class ExportError(Exception):
    """Root of all errors of this package. Whenever one is raised, what was there before is as it was."""


class FormatError(ExportError, ValueError):
    """A request that no export can fulfil: unknown format, number out of range."""


class UnavailableError(FormatError):
    """A format that cannot be built on this machine; its message says what is missing and how to get it."""


class GraphError(ExportError):
    """The network could not be turned into an artefact of a format."""


class DamagedArtifactError(GraphError):
    """An artefact that its runtime cannot open: altered, incomplete, or of another version."""


class PrecisionError(GraphError):
    """An artefact that computes in another precision than was asked for, such as a plan that is silently FP32."""


class GoldenTilesError(ExportError, ValueError):
    """Tiles to compare on, or to calibrate with, are missing, too few, or hold a file that is no tile."""


class ParityError(ExportError):
    """An artefact does not answer as PyTorch does on the golden tiles.

    Attributes:
        measured: how far off it is, over all tiles; None where that could not be measured to the end.
        speed: how fast it is; None where that was not looked at.
    """

    def __init__(self, message: str, *, measured: Parity | None = None, speed: Speed | None = None) -> None:
        super().__init__(message)
        self.measured = measured
        self.speed = speed


class RefusedError(ParityError):
    """An artefact of a lower precision that is not worth its loss: not faster, or not smaller, than FP32."""


class ServedError(ParityError):
    """The server does not load what was staged, or does not answer as PyTorch does."""


class RepositoryError(ExportError):
    """The model repository cannot be used or written; whatever was begun was rolled back."""


class RepositoryBusyError(RepositoryError):
    """Another export is writing to the same repository."""


class ReleaseError(ExportError):
    """A release that cannot be read or written.

    Attributes:
        problems: one line each; empty where the message says all.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__(message + "".join(f"\n  - {problem}" for problem in self.problems))


class ReleaseVersionError(ReleaseError, ValueError):
    """A release of a format or version that this code does not read, or a directory that is none."""


class ReleaseExistsError(ReleaseError, ValueError):
    """There is something where a release was to be written."""


class ReleaseBusyError(ReleaseError):
    """Another export is writing the same release."""
