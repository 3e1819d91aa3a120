"""Training, on Accelerate: one process or many, CPU or GPU, tiles or bags, from the start or from a kill."""

from __future__ import annotations

import accelerate

from training.loop import OnSnapshot, Training, TrainingResult
from training.recipe import Recipe
from training.resume import StateKeeper
from training.task import Task

__all__ = ["OnSnapshot", "TrainingResult", "train"]


def train(
    recipe: Recipe,
    task: Task,
    accelerator: accelerate.Accelerator,
    *,
    keeper: StateKeeper | None = None,
    on_snapshot: OnSnapshot | None = None,
) -> TrainingResult:
    """Train for all epochs, or until the validation set has not been answered better for a while.

    The last weights are kept, or with early stopping those of the best epoch; held-out items choose nothing.

    Args:
        keeper: saves the state, and has the one to go on from; None does neither.
        on_snapshot: called at the end of every cycle of a cyclic schedule.

    Raises:
        ArchitectureError, PretrainedError: as `Task.build_network`.
        DataError: fewer items than one step of all processes takes.
        DivergedError: the loss of any process is infinite or not a number.
        ResumeError: `keeper` holds the state of another training.
    """
    training = Training(recipe, task, accelerator, keeper, on_snapshot)
    while training.epoch <= recipe.epochs and not training.stopping.should_stop:
        training.learn_epoch()
        training.close_epoch()
    return training.result()
