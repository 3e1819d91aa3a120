"""Tracking of training runs: MLflow 3 and TensorBoard, through Accelerate's trackers.

    options = tracking.read_options(arguments)            # after tracking.add_arguments(parser)
    run = tracking.start(options, recipe=..., data=..., run_dir=OUT, run_name="x")
    accelerator = Accelerator(log_with=run.trackers or None)
    ...                                                   # accelerator.log({"train_loss": 0.4}, step=120)
    run.finish(status="FINISHED", metrics=scores, checkpoint=OUT / "checkpoint", files=[OUT / "held_out.csv"])

Records go first to an append-only journal in OUT/tracking/. A process of its own follows the journal and sends it, so
that neither the import of MLflow nor a lost, slow or hanging server can hold up the loop; `python -m training sync
OUT` sends later what could not be sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.tracking.options import TrackingOptions, add_arguments, read_options

if TYPE_CHECKING:
    import argparse

    from training.tracking.run import Tracking

__all__ = ["TrackingOptions", "add_arguments", "read_options", "start"]


def start(
    options: TrackingOptions | argparse.Namespace,
    *,
    recipe: Mapping[str, Any],
    run_dir: Path | str,
    run_name: str,
    data: Mapping[str, Any] | None = None,
    resume: bool = False,
    command_line: Sequence[str] | None = None,
) -> Tracking:
    """Begin to track a run, or go on with the one that an interruption left; see `training.tracking.run.Tracking`.

    Call it on every process, before `Accelerator()`: only the one of rank 0 tracks. Nothing is imported for
    `--track none`, and MLflow never in this process.

    Args:
        recipe: becomes the run's parameters, nested tables flattened with dots.
        run_dir: where the journal lies, in `run_dir`/tracking.
        data: what is learnt from (fingerprint, slides, patients, ...); may be told later by `Tracking.log_data`.
        resume: go on with the last run of `run_dir`, if there is one.
        command_line: as recorded; by default the one of this process.

    Raises:
        TrackingOptionsError: as `read_options`.
        TrackingError: the folder of the journal or of the store cannot be made.
    """
    from training.tracking.run import start_run

    if not isinstance(options, TrackingOptions):
        options = read_options(options)
    return start_run(
        options,
        recipe=recipe,
        data=data,
        run_dir=Path(run_dir),
        run_name=run_name,
        resume=resume,
        command_line=command_line,
    )
