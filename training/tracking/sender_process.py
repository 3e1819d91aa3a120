"""The child process that sends a run's journal, seen from the training process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from training.tracking import identity

LOST_WAIT_S = 5.0  # how long the end of training waits for a store that was found lost
SEND_WAIT_S = 60.0  # and for one that answers
KILL_WAIT_S = 1.0
ROOT = Path(__file__).resolve().parents[2]


class SenderProcess:
    """`python -m training.tracking.sender`, an interpreter of its own: a hanging call in it holds up nobody."""

    def __init__(self, directory: Path, uri: str) -> None:
        self._directory = directory
        self._uri = uri
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, ends_behind: int) -> None:
        """Start it; where that fails, the journal still holds all.

        Args:
            ends_behind: bytes of the journal; a record "end" behind them ends the run. The one of a run that was
                resumed lies before them.
        """
        words = (str(self._directory), str(os.getpid()), str(ends_behind))
        search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "training.tracking.sender", *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "PYTHONPATH": search,
                    "PYTHONSAFEPATH": "1",  # a mlflow.py in the current folder is not meant
                    "CLOTLINE_TRACKING_URI": self._uri,  # with its password, which is written nowhere
                },
                start_new_session=True,  # Ctrl-C is for the training process, which then ends the run
            )
        except OSError as error:
            print(
                f"\nwarning: the process that sends to MLflow cannot be started: {error}; records are kept",
                file=sys.stderr,
            )

    def wait(self) -> None:
        """Wait until the ended journal is sent: LOST_WAIT_S for a lost store, SEND_WAIT_S for a slow one."""
        if self._process is None or self._process.poll() is not None:
            self.start(ends_behind=0)
        if self._process is None:
            return
        started_s = looked_s = time.monotonic()
        limit_s = SEND_WAIT_S
        while self._process.poll() is None and time.monotonic() - started_s < limit_s:
            time.sleep(0.02)
            if time.monotonic() - looked_s > 0.25:
                looked_s = time.monotonic()
                lost = identity.read_sent(self._directory, self._uri).trouble is not None
                limit_s = LOST_WAIT_S if lost else SEND_WAIT_S
        for stop in (self._process.terminate, self._process.kill):
            if self._process.poll() is not None:
                return
            stop()
            # One that waits for a disk cannot even be killed, and is not ours to wait for.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(KILL_WAIT_S)
