"""Trackers for `Accelerator(log_with=...)`: one appends to the journal, one writes TensorBoard's files.

Only the process of rank 0 is given any, so none of them asks which process it is in.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker

from training.tracking.journal import Journal

QUEUED_EVENTS = 1000
FLUSH_S = 10


class MLflowTracker(GeneralTracker):
    """What is logged goes to the journal, from where a process of its own sends it to MLflow."""

    name = "mlflow"
    requires_logging_directory = False

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal

    @property
    def tracker(self) -> Journal:
        return self._journal

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._journal.metrics(values, self._journal.last_step + 1 if step is None else step)


class TensorBoardTracker(GeneralTracker):
    """TensorBoard's event files, flushed every FLUSH_S seconds and not on each call as Accelerate's own tracker does.

    A resumed run hides what an interrupted one wrote from its first step on (`purge_step`): steps appear once.
    """

    name = "tensorboard"
    requires_logging_directory = False

    def __init__(self, directory: Path, *, resumed: bool) -> None:
        super().__init__()
        self._directory = directory
        self._resumed = resumed
        self._writer: Any = None
        self._failed = False
        self._last_step = -1

    @property
    def tracker(self) -> Any:
        return self._writer

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if self._failed:
            return
        step = self._last_step + 1 if step is None else step
        self._last_step = max(self._last_step, step)
        try:
            if self._writer is None:
                self._writer = self._open(step)
            from tensorboard.compat.proto.summary_pb2 import Summary

            numbers = {
                name: value for name, value in values.items() if not isinstance(value, (str, type(None)))
            }
            entries = [Summary.Value(tag=name, simple_value=float(v)) for name, v in numbers.items()]
            # One event for all of them: `add_scalar` for each takes three times as long.
            self._writer.file_writer.add_summary(Summary(value=entries), step)
        except Exception as error:  # a full disk, a value that is no number: the run goes on
            self._failed = True
            print(
                f"\nwarning: TensorBoard's files in {self._directory} cannot be written: {error}; training goes on",
                file=sys.stderr,
            )

    def finish(self) -> None:
        self.close()

    def close(self) -> None:
        """Flush and close; logging again opens a further file."""
        if self._writer is not None and not self._failed:
            try:
                self._writer.close()
            except Exception as error:
                print(f"warning: TensorBoard's files may be incomplete: {error}", file=sys.stderr)
        self._writer, self._resumed = None, False

    def _open(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(
            str(self._directory),
            max_queue=QUEUED_EVENTS,
            flush_secs=FLUSH_S,
            purge_step=step if self._resumed else None,
        )
