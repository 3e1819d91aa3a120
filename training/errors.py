"""What can go wrong in training.

TrainingError
  RecipeError                a recipe that cannot be found, parsed or meant seriously; lists every problem
  ArchitectureError          a network that torchvision does not have, or that does not fit the input
  DataError                  slides or tiles that cannot be trained on; lists every problem
  DivergedError              the loss is no longer a finite number
  CheckpointError            a checkpoint that is missing, damaged, or does not fit its own manifest
    CheckpointVersionError   a checkpoint in a format that this code does not read
  OutputExistsError          an output directory that already holds a checkpoint
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


class DivergedError(TrainingError, ArithmeticError):
    """The loss became infinite or not a number; nothing was saved."""


class CheckpointError(TrainingError):
    """A checkpoint that is missing, incomplete, damaged, or not of the architecture it names."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint of a format or version that this code does not read."""


class OutputExistsError(TrainingError):
    """The output directory holds a checkpoint already, and replacing it was not asked for."""
