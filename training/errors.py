"""What can go wrong in training.

TrainingError
  RecipeError                a recipe that cannot be found, parsed or meant seriously; lists every problem
  ArchitectureError          a network that torchvision does not have, or that does not fit the input
  PretrainedError            weights to start from that cannot be had or do not fit; lists every problem
  DataError                  slides or tiles that cannot be trained on; lists every problem
  FoldsError                 a folds file that is damaged or was made of other data; lists every problem
  TableError                 tables of predictions that cannot be ensembled or scored; lists every problem
  EnsembleError              a definition of an ensemble that is missing, damaged, or does not fit
  EvaluationError            checkpoints and data that cannot be evaluated together; lists every problem
  StoreError                 a tile store that is missing, unfinished, damaged, in use, or does not fit; lists every problem
  CrossValidationError       a fold whose training failed
  DivergedError              the loss is no longer a finite number
  LaunchError                processes that were started together but do not train together
  ResumeError                an interrupted training that cannot go on as asked; lists every problem
  CheckpointError            a checkpoint that is missing, damaged, or does not fit its own manifest
    CheckpointVersionError   a checkpoint in a format that this code does not read
  OutputExistsError          an output directory that already holds a checkpoint
  TrackingError              a run, store or registry entry that cannot be found, reached or written
    TrackingOptionsError     a URI, name or alias that cannot be meant
"""

from __future__ import annotations

from collections.abc import Sequence


class TrainingError(Exception):
    """Root of everything that `training` raises on purpose."""


class _Listing(TrainingError, ValueError):
    """An error that reports all problems of one source at once.

    Attributes:
        source: what was looked at, for example a file.
        problems: one line each.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        count = len(self.problems)
        super().__init__(f"{source}: {count} problem{'s' if count != 1 else ''}{lines}")

    def __reduce__(self) -> tuple[type[_Listing], tuple[str, tuple[str, ...]]]:
        return (type(self), (self.source, self.problems))


class RecipeError(_Listing):
    """A recipe that cannot be used; `.problems` holds all that is wrong with it."""


class DataError(_Listing):
    """Data that cannot be trained on; `.problems` holds all that is wrong with it."""


class ArchitectureError(TrainingError, ValueError):
    """A network that torchvision does not have, or that does not fit the size of the input."""


class PretrainedError(_Listing):
    """Weights to start from that cannot be had, read or put into the network; `.problems` holds what does not fit."""


class CrossValidationError(TrainingError):
    """The training of a fold failed; folds that were finished before are kept."""


class DivergedError(TrainingError, ArithmeticError):
    """The loss became infinite or not a number; nothing was saved."""


class LaunchError(TrainingError, ValueError):
    """Processes that were started together but do not train together."""


class ResumeError(_Listing):
    """An interrupted training that cannot go on as asked; `.problems` holds every difference."""


class CheckpointError(TrainingError):
    """A checkpoint that is missing, incomplete, damaged, or not of the architecture it names."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint of a format or version that this code does not read."""


class OutputExistsError(TrainingError):
    """The output directory holds a checkpoint already, and replacing it was not asked for."""


class FoldsError(_Listing):
    """Folds that are damaged, or were made of other patients; `.problems` holds all that is wrong with them."""


class TableError(_Listing):
    """Tables of predictions that cannot be scored or ensembled; `.problems` holds all that is wrong with them."""


class EnsembleError(_Listing):
    """A definition of an ensemble that is missing, damaged, or does not fit; `.problems` holds all that is wrong."""


class EvaluationError(_Listing):
    """Checkpoints and data that cannot be evaluated together; `.problems` holds all that is wrong with them."""


class TrackingError(TrainingError):
    """A tracked run, a tracking store or an entry of the registry cannot be found, reached or written."""


class TrackingOptionsError(TrackingError, ValueError):
    """A tracker, URI, name or alias that cannot be meant; known without asking any server."""


class StoreError(_Listing):
    """A tile store that is missing, unfinished, damaged, in use, or was cut otherwise than asked for."""
