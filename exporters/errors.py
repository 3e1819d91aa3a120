"""Errors of the exporters.

ExportError
 +-- FormatError          a format's name is unknown, given twice or missing; a number is out of range
 +-- GraphError           the network could not be written in a format, or the file cannot be opened again
 +-- GoldenTilesError     the parity gate has no usable tiles
 +-- ParityError          the written file does not answer as PyTorch does; nothing was published
 +-- RepositoryError      the repository cannot be read, written or extended; it is as it was before
      +-- RepositoryBusyError   another export holds the repository
"""


class ExportError(Exception):
    """Root of all errors of this package. Whenever one is raised, the repository is as it was before."""


class FormatError(ExportError, ValueError):
    """A request that no export can fulfil: unknown format, number out of range."""


class GraphError(ExportError):
    """The network could not be turned into an artefact of a format."""


class GoldenTilesError(ExportError):
    """The directory of golden tiles is missing, empty, or holds a file that is no tile."""


class ParityError(ExportError):
    """An artefact does not answer as PyTorch does on the golden tiles."""


class RepositoryError(ExportError):
    """The model repository cannot be used or written; whatever was begun was rolled back."""


class RepositoryBusyError(RepositoryError):
    """Another export is writing to the same repository."""
