"""Whether an execution of a network is the only one in its server, and may take all cores. Used by our Python-based backends.

Under load every instance keeps to its own thread. A lone request would then take as long as one core needs, so a backend
holds its network a second time, with more threads, for the executions that find nobody else executing.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

INSTANCE_VARIABLE = "CLOTLINE_INSTANCE"
"""Environment variable with the id of the server (serving/processes.py)."""
PARAMETER = "alone_thread_count"
"""Of a network: threads of a lone execution; 0 for every core, at most MOST_THREADS."""
MOST_THREADS = 8
_SHARED_MEMORY = "/dev/shm"  # nosec B108  # noqa: S108


def threads_alone(asked: int) -> int:
    """Threads of a lone execution.

    Args:
        asked: the parameter's value.
    """
    return asked or min(len(os.sched_getaffinity(0)), MOST_THREADS)


def neighbours_here() -> Neighbours | None:
    """The table of the server that this process belongs to; None outside of one of ours."""
    server = os.environ.get(INSTANCE_VARIABLE, "")
    return Neighbours(server) if re.fullmatch(r"[\w-]+", server) else None


class Neighbours:
    """Which instances of networks, in all stubs of one server, are executing at this moment.

    They share a table in shared memory with a row (pid, monotonic nanoseconds at which its execution began, or 0) an
    instance. Its name begins with the prefix of the server's regions (serving/processes.py), so that it is removed
    with them. A row of 64-bit numbers has one writer; readers may be late by an execution, which costs time only.
    """

    ROWS = 256
    FORGOTTEN_NS = 30_000_000_000  # an execution that began before that has ended with its stub

    def __init__(self, server: str) -> None:
        path = f"{_SHARED_MEMORY}/clotline_{server}_executing"
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            os.ftruncate(handle, self.ROWS * 16)
            self.memory = mmap.mmap(handle, self.ROWS * 16)
            self.rows = np.frombuffer(self.memory, np.int64).reshape(self.ROWS, 2)
            free = (row for row in range(self.ROWS) if not self._lives(int(self.rows[row, 0])))
            self.own = next(free, None)
            if self.own is not None:
                self.rows[self.own] = os.getpid(), 0
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # mmap holds the file open: closing alone would not release it
            os.close(handle)

    @staticmethod
    def _lives(pid: int) -> bool:
        return pid > 0 and os.path.exists(f"/proc/{pid}")

    @contextmanager
    def executing(self) -> Iterator[bool]:
        """Says that this instance executes; gives whether it is the only one."""
        if self.own is None:
            yield False
            return
        now = time.monotonic_ns()
        began = self.rows[:, 1]
        alone = not np.any(began > now - self.FORGOTTEN_NS)
        began[self.own] = now
        try:
            yield alone
        finally:
            began[self.own] = 0
