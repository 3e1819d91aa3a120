"""python -m training.tracking.sender DIRECTORY PARENT_PID ENDS_BEHIND

Follow the journal of a run and send it to MLflow; started by the training process, which goes on whatever happens here.
It ends when the journal says so or its parent is gone; `python -m training sync` sends what is left then.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from training.errors import TrackingError
from training.tracking import identity, journal, model, store
from training.tracking.system_metrics import SystemMetrics

POLL_S = 0.1
SEND_EVERY_S = 2.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
ORPHAN_S = 30  # what a sender may take after its training process was killed
NICENESS = 5


class LockedError(TrackingError):
    """Another process is sending this run."""


class Sender:
    """Sends the records of one run, oldest first, and remembers how far it came.

    Raises:
        LockedError: another process does so already.
        TrackingError: run.json cannot be read.
    """

    def __init__(self, directory: Path, uri: str, *, warn: Callable[[str], None]) -> None:
        self.directory = directory
        self.identity = identity.read(directory)
        self.uri = uri
        self.sent = identity.read_sent(directory, uri)
        self._warn = warn
        self._client: Any = None
        self._run: store.StoredRun | None = None
        self._lock = _locked(directory)
        for left in directory.glob(f"{model.SCRATCH_PREFIX}*"):  # of a sender that was killed
            shutil.rmtree(left, ignore_errors=True)

    def close(self) -> None:
        self._lock.close()

    def send(self) -> int:
        """Send all that is there and return how many records that was.

        Raises:
            store.StoreLostError: the store is lost; what it took before is remembered.
        """
        count = 0
        try:
            if not self._pending():
                return 0
            run = self._stored_run()
            for name in identity.FILES:
                for records, offset in _batches(self.directory / name, self.sent.offsets.get(name, 0)):
                    self._apply(run, records)
                    self.sent.offsets[name] = offset
                    self._remember(trouble=None)
                    count += len(records)
        except Exception as error:
            lost = store.as_our_error(error, self.uri)
            self._run = None  # look for it again: the server may be another one when it is back
            self._remember(trouble=str(lost))
            raise store.StoreLostError(str(lost)) from error
        return count

    def end_as_killed(self) -> None:
        """Mark the run in MLflow as killed if its training process, which is gone, did not say how it ended."""
        if self._run is None:
            return
        states = [r for r, _ in journal.read(self.directory / journal.JOURNAL_NAME) if r["kind"] in _STATES]
        if states and states[-1]["kind"] != "end":
            try:
                self._run.end("KILLED", time.time_ns() // 1_000_000)
            except Exception as error:
                raise store.StoreLostError(str(store.as_our_error(error, self.uri))) from error

    def _pending(self) -> bool:
        for name in identity.FILES:
            path = self.directory / name
            if path.exists() and path.stat().st_size > self.sent.offsets.get(name, 0):
                return True
        return False

    def _stored_run(self) -> store.StoredRun:
        if self._client is None:
            self._client = store.connect(self.uri)
        if self._run is None:
            who = self.identity
            run, is_other = store.StoredRun.find_or_create(
                self._client,
                run_id=who.run_id,
                name=who.run_name,
                experiment=who.experiment,
                uri=self.uri,
                time_ms=who.created_ms,
                known=self.sent.mlflow_run_id,
            )
            if is_other:
                self.sent = identity.Sent(uri=self.sent.uri, mlflow_run_id=run.mlflow_run_id)
                self._remember(trouble=None)
            self._run = run
        return self._run

    def _apply(self, run: store.StoredRun, records: list[dict[str, Any]]) -> None:
        """Send records of one kind; one that is refused for good is left out with a warning."""
        try:
            self._apply_together(run, records)
            return
        except Exception as error:
            refused = store.as_our_error(error, self.uri)
            if not isinstance(refused, store.RefusedError):
                raise
        # The same is said of a run that a person deleted (then this raises) or that a new, empty store does not know.
        self._run = None
        if self._stored_run().mlflow_run_id != run.mlflow_run_id:
            raise store.StoreLostError("the store lost this run; all of it is sent again")
        if len(records) > 1:
            for record in records:
                self._apply(run, [record])
            return
        self.sent.refused += 1
        self._warn(
            f"MLflow cannot take a record of this run ({records[0]['kind']}): {refused}; it is left out"
        )

    def _apply_together(self, run: store.StoredRun, records: list[dict[str, Any]]) -> None:
        if records[0]["kind"] == "metrics":
            run.log_metrics(records)
            return
        for record in records:
            apply = _APPLY.get(record["kind"])
            if apply is None:
                raise store.RefusedError(f"records of kind {record['kind']!r} are not known to this Clotline")
            apply(self, run, record)

    def _remember(self, *, trouble: str | None) -> None:
        self.sent.trouble = trouble
        try:
            identity.write_sent(self.directory, self.sent)
        except OSError as error:  # what is sent twice for it does no harm
            logging.getLogger(__name__).warning("%s cannot be written: %s", identity.SENT_NAME, error)

    # One function a kind of record.

    def _begin(self, run: store.StoredRun, record: dict[str, Any]) -> None:
        about = record["environment"]
        command_line = " ".join(about["command_line"])
        run.set_tags(
            {
                "mlflow.user": about["user"],
                "mlflow.source.name": command_line,
                "mlflow.source.type": "LOCAL",
                "mlflow.source.git.commit": about["git_commit"],
                "clotline.command_line": command_line,
                "clotline.host": about["host"],
                "clotline.hardware": ", ".join([about["hardware"]["cpu"], *about["hardware"]["gpus"]]),
            }
        )
        run.log_params(record["recipe"])
        run.log_json(record["recipe"], "recipe.json")
        run.log_json(about, "environment.json")

    def _resume(self, run: store.StoredRun, record: dict[str, Any]) -> None:
        run.resume()

    def _data(self, run: store.StoredRun, record: dict[str, Any]) -> None:
        run.log_dataset(record["data"])
        run.log_json(record["data"], "data.json")

    def _files(self, run: store.StoredRun, record: dict[str, Any]) -> None:
        for told in record["paths"]:
            path = self._path(told)
            if not path.exists():
                self._warn(f"{path} is gone and cannot be kept in MLflow; it is left out")
                continue
            run.log_file(path, record.get("folder", ""))
            self._figures(run, path)

    def _figures(self, run: store.StoredRun, path: Path) -> None:
        from training.tracking import figures

        try:
            drawn = figures.draw(path, self.directory / "figures")
        except Exception as error:  # a table of another shape is no reason to lose the run
            self._warn(f"{path} cannot be drawn: {error}")
            return
        for figure in drawn:
            run.log_file(figure, "plots")

    def _model(self, run: store.StoredRun, record: dict[str, Any]) -> None:
        version = model.log_checkpoint(
            run,
            self._path(record["checkpoint"]),
            record,
            register=self.identity.register,
            scratch=self.directory,
        )
        self.sent.model_version = version

    def _end(self, run: store.StoredRun, record: dict[str, Any]) -> None:
        run.end(record["status"], record["time_ms"])

    def _path(self, told: str) -> Path:
        """A path of the journal; relative ones are meant from the folder of the run."""
        return self.directory.parent.parent / told


_STATES = ("run", "resumed", "end")
_APPLY: dict[str, Callable[[Sender, store.StoredRun, dict[str, Any]], None]] = {
    "run": Sender._begin,
    "resumed": Sender._resume,
    "data": Sender._data,
    "files": Sender._files,
    "model": Sender._model,
    "end": Sender._end,
}


def _batches(path: Path, offset: int) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Neighbouring records of kind metrics together (as many as one call takes), others alone; with the offset behind."""
    records = journal.read(path, offset)
    for is_metrics, group in itertools.groupby(records, key=lambda item: item[0]["kind"] == "metrics"):
        batch: list[dict[str, Any]] = []
        numbers, end = 0, offset
        for record, behind in group:
            size = len(record["values"]) if is_metrics else store.METRICS_A_CALL
            if batch and numbers + size > store.METRICS_A_CALL:
                yield batch, end
                batch, numbers = [], 0
            batch.append(record)
            numbers, end = numbers + size, behind
        yield batch, end


def _locked(directory: Path) -> IO[bytes]:
    stream = (directory / "sender.lock").open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        stream.close()
        raise LockedError(f"another process is sending the run in {directory}") from error
    return stream


def follow(directory: Path, parent: int, uri: str, *, ends_behind: int, warn: Callable[[str], None]) -> int:
    """Send until the journal ends or the parent is gone; 0 if all was sent, 1 if not.

    Args:
        parent: process id of the training process.
        ends_behind: bytes of the journal behind which a record "end" ends this run.
    """
    sender = _first_of(directory, parent, uri, warn)
    ending = _Ending(directory / journal.JOURNAL_NAME, ends_behind)
    system = SystemMetrics(directory / identity.SYSTEM_NAME, parent)
    try:
        next_send_s, pause_s, warned, unsent = 0.0, FIRST_PAUSE_S, False, True
        while True:
            orphan = os.getppid() != parent
            over = orphan or ending.reached()
            if orphan:
                _exit_in(ORPHAN_S)  # nobody is there who would kill a process that hangs
            if over or time.monotonic() >= next_send_s:
                try:
                    sender.send()
                    next_send_s, pause_s, unsent = time.monotonic() + SEND_EVERY_S, FIRST_PAUSE_S, False
                    if orphan:
                        sender.end_as_killed()
                except store.StoreLostError as error:
                    if not warned and not over:
                        warn(f"{error}; training goes on, records are kept in {directory}")
                    warned = unsent = True
                    next_send_s = time.monotonic() + pause_s
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if over:
                return int(unsent)
            system.sample_when_due()
            time.sleep(POLL_S)
    finally:
        sender.close()


class _Ending:
    """Watches a journal, from an offset on, for the record that ends the run."""

    def __init__(self, path: Path, offset: int) -> None:
        self._path = path
        self._offset = offset
        self._reached = False

    def reached(self) -> bool:
        if not self._reached and self._path.exists() and self._path.stat().st_size > self._offset:
            for record, offset in journal.read(self._path, self._offset):
                self._reached |= record["kind"] == "end"
                self._offset = offset
        return self._reached


def _exit_in(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _first_of(directory: Path, parent: int, uri: str, warn: Callable[[str], None]) -> Sender:
    """The sender, as soon as the one of an interrupted training has let go of the run."""
    while True:
        try:
            return Sender(directory, uri, warn=warn)
        except LockedError:
            if os.getppid() != parent:
                raise
            time.sleep(POLL_S)


def main(arguments: list[str]) -> int:
    """The process that `training.tracking.run` starts."""
    directory, parent, ends_behind = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves no half-made model behind
    os.nice(NICENESS)
    terminal = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
    log = os.open(directory / "sender.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 2)  # what MLflow and its parts say is for a file, ours is for the person

    def warn(text: str) -> None:
        print(f"\nwarning: {text}", file=terminal, flush=True)

    uri = os.environ.get("CLOTLINE_TRACKING_URI") or identity.read(directory).uri
    return follow(directory, parent, uri, ends_behind=ends_behind, warn=warn)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
