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
 +-- RepositoryError      the repository cannot be read, written or extended; it is as it was before
      +-- RepositoryBusyError   another export holds the repository
"""


class ExportError(Exception):
    """Root of all errors of this package. Whenever one is raised, the repository is as it was before."""


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


class GoldenTilesError(ExportError):
    """Tiles to compare on, or to calibrate with, are missing, too few, or hold a file that is no tile."""


class ParityError(ExportError):
    """An artefact does not answer as PyTorch does on the golden tiles."""


class RefusedError(ParityError):
    """An artefact of a lower precision that is not worth its loss: not faster, or not smaller, than FP32."""


class RepositoryError(ExportError):
    """The model repository cannot be used or written; whatever was begun was rolled back."""


class RepositoryBusyError(RepositoryError):
    """Another export is writing to the same repository."""
