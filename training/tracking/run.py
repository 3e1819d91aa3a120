"""A tracked run, as the training process sees it: a journal on disk and a child process that sends it."""

from __future__ import annotations

import datetime
import os
import shlex
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from training.errors import TrackingError
from training.tracking import environment, identity
from training.tracking.journal import JOURNAL_NAME, Journal
from training.tracking.options import TrackingOptions, prepare_store, redacted
from training.tracking.sender_process import SenderProcess

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

Status = Literal["FINISHED", "FAILED", "KILLED"]


class _Kept(NamedTuple):
    """What a run that goes to MLflow has on disk, and who sends it."""

    directory: Path
    journal: Journal
    sender: SenderProcess
    uri: str


class Tracking:
    """A run that is tracked, or none (`trackers` is empty then and every method does nothing).

    No method raises, and none waits for a server but `finish`, for a bounded time.

    Attributes:
        trackers: for `Accelerator(log_with=...)`.
        run_id: our own id of the run (MLflow tag clotline.run_id); "" where nothing goes to MLflow.
    """

    def __init__(
        self, trackers: Sequence[GeneralTracker] = (), *, run_id: str = "", kept: _Kept | None = None
    ) -> None:
        self.trackers = list(trackers)
        self.run_id = run_id
        self._kept = kept
        self._finished = False

    @property
    def directory(self) -> Path | None:
        """The folder of the journal; None where nothing goes to MLflow."""
        return self._kept.directory if self._kept else None

    @property
    def mlflow_run_id(self) -> str | None:
        """MLflow's id of the run, None until MLflow was reached."""
        if self._kept is None:
            return None
        return identity.read_sent(self._kept.directory, self._kept.uri).mlflow_run_id

    def log(self, values: Mapping[str, Any], step: int | None) -> None:
        """Log numbers of a step to all trackers; for code without an Accelerator."""
        for tracker in self.trackers:
            tracker.log(dict(values), step=step)

    def log_data(self, data: Mapping[str, Any]) -> None:
        """Say what is learnt from; `fingerprint` becomes the digest of MLflow's dataset."""
        if self._kept is not None:
            self._kept.journal.append("data", data=dict(data))

    def log_files(self, files: Sequence[Path | str], folder: str = "") -> None:
        """Have files copied to the store, from where they lie when they are sent."""
        if self._kept is not None and files:
            paths = [_told(path, self._kept.directory) for path in files]
            self._kept.journal.append("files", paths=paths, folder=folder)

    def finish(
        self,
        *,
        status: Status = "FINISHED",
        metrics: Mapping[str, float] | None = None,
        checkpoint: Path | str | None = None,
        files: Sequence[Path | str] = (),
    ) -> dict[str, Any]:
        """End the run and wait until all is sent, for the bounded time that `SenderProcess.wait` names.

        Args:
            metrics: final scores, logged one step behind the last.
            checkpoint: becomes the run's model, and a version in the registry where `--register` asks for it.
            files: held_out.csv and history.json among them are drawn as well (confusion matrix, learning curves).

        Returns:
            run_id, mlflow_run_id, uri, unsent_records and model_version, as JSON types; {} where nothing goes to MLflow.
        """
        if self._finished:
            return {}
        self._finished = True
        if metrics:
            self.log(metrics, step=None)
        for tracker in self.trackers:
            tracker.finish()
        if self._kept is None:
            return {}
        directory, journal, sender, uri = self._kept
        self.log_files(files)
        if checkpoint is not None:
            journal.append(
                "model",
                checkpoint=_told(checkpoint, directory),
                metrics=dict(metrics or {}),
                step=journal.last_step,
                metrics_time_ms=journal.metrics_time_ms,
            )
        journal.append("end", status=status)
        journal.close()
        sender.wait()
        sent = identity.read_sent(directory, uri)
        unsent = identity.unsent_records(directory, sent)
        if unsent:
            why = f" ({sent.trouble})" if sent.trouble else ""
            print(
                f"warning: {unsent} records were not sent to {redacted(uri)}{why}; they are kept in {directory}, send "
                f"them with: python -m training sync {shlex.quote(str(directory.parent.parent))}",
                file=sys.stderr,
            )
        return {
            "run_id": self.run_id,
            "mlflow_run_id": sent.mlflow_run_id,
            "uri": redacted(uri),
            "unsent_records": unsent,
            "model_version": sent.model_version,
        }


def start_run(
    options: TrackingOptions,
    *,
    recipe: Mapping[str, Any],
    data: Mapping[str, Any] | None,
    run_dir: Path,
    run_name: str,
    resume: bool,
    command_line: Sequence[str] | None,
) -> Tracking:
    """As `training.tracking.start`."""
    if not options.trackers or os.environ.get("RANK", "0") != "0":
        return Tracking()
    from training.tracking.trackers import MLflowTracker, TensorBoardTracker

    trackers: list[GeneralTracker] = []
    if "tensorboard" in options.trackers:
        trackers.append(TensorBoardTracker(run_dir / "tensorboard", resumed=resume))
    if "mlflow" not in options.trackers:
        return Tracking(trackers)
    prepare_store(options.uri)
    directory, who = _directory(options, run_dir, run_name, resume=resume)
    try:
        journal = Journal(directory / JOURNAL_NAME)
    except OSError as error:
        raise TrackingError(f"the journal of this run cannot be written: {error}") from error
    uri = options.uri if identity.is_redacted(who.uri) else who.uri
    kept = _Kept(directory, journal, SenderProcess(directory, uri), uri)
    run = Tracking([MLflowTracker(journal), *trackers], run_id=who.run_id, kept=kept)
    if journal.is_new:
        about = environment.describe(command_line)
        journal.append("run", name=run_name, recipe=dict(recipe), environment=about)
    else:
        journal.append("resumed")
    if data is not None:
        run.log_data(data)
    kept.sender.start(ends_behind=(directory / JOURNAL_NAME).stat().st_size)
    return run


def _directory(
    options: TrackingOptions, run_dir: Path, run_name: str, *, resume: bool
) -> tuple[Path, identity.Identity]:
    """The folder of the journal, with its run.json: a new one, or that of the run which goes on."""
    old = identity.runs_of(run_dir)
    try:
        if resume and old:
            who = identity.read(old[-1])
            if options.uri_told:
                who = who.replaced(uri=redacted(options.uri), experiment=options.experiment)
            who = who.replaced(register=options.register or who.register)
            identity.write(old[-1], who)
            return old[-1], who
        now = datetime.datetime.now(datetime.timezone.utc)
        who = identity.Identity(
            run_id=uuid.uuid4().hex,
            run_name=run_name,
            uri=redacted(options.uri),
            experiment=options.experiment,
            register=options.register,
            created_utc=now.isoformat(timespec="milliseconds"),
        )
        directory = run_dir / "tracking" / f"{now:%Y%m%dT%H%M%S.%f}-{who.run_id[:8]}"
        directory.mkdir(parents=True)
        identity.write(directory, who)
        return directory, who
    except OSError as error:
        raise TrackingError(f"the journal of this run cannot be written: {error}") from error


def _told(path: Path | str, directory: Path) -> str:
    """A path as the journal has it: relative to the run's folder where it lies inside, so that this may be moved."""
    run_dir, path = directory.parent.parent.resolve(), Path(path).resolve()
    return str(path.relative_to(run_dir) if path.is_relative_to(run_dir) else path)
