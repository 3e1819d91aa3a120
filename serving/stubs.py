"""The processes in which Triton runs Python models ("stubs"), found among the children of tritonserver.

Triton 2.51 never starts a stub again: when one dies, every request that reaches its instance waits a second and fails,
while server, model and ensemble stay "ready". A stub's command line names its model, version and shared memory:
`triton_python_backend_stub <repository>/<model>/<version>/<file> <region> ... <model>_<group>_<number> <backend>`.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.processes import SHARED_MEMORY, start_time_ticks

STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Stub:
    """One living stub. `region` is the name of its shared memory."""

    pid: int
    start_ticks: int
    model: str
    version: str
    region: str

    @property
    def lives(self) -> bool:
        """True until the process has ended."""
        return start_time_ticks(self.pid) == self.start_ticks

    def remove_shared_memory(self) -> None:
        """Delete the name of its shared memory; the memory itself goes with the last process that uses it."""
        with contextlib.suppress(OSError):
            (SHARED_MEMORY / self.region).unlink()


def stubs_of(server_pid: int) -> list[Stub]:
    """The living stubs of a tritonserver."""
    found = []
    for pid in _children(server_pid):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        start_ticks = start_time_ticks(pid)
        if start_ticks is None or len(words) < 3 or Path(words[0]).name != STUB:
            continue
        _, model, version, _ = ("", "", "", *Path(words[1]).parts)[-4:]
        found.append(Stub(pid, start_ticks, model, version, words[2]))
    return found


def _children(pid: int) -> list[int]:
    """Children of a process, those that nobody has waited for included."""
    found: list[int] = []
    tasks = f"/proc/{pid}/task"
    try:
        for thread in os.listdir(tasks):  # a server has some two hundred: nothing slower than bare files
            with (
                contextlib.suppress(ProcessLookupError),
                open(f"{tasks}/{thread}/children", "rb", 0) as children,
            ):
                found += map(int, children.read().split())
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN, or the process is gone
        return _children_by_parent(pid)
    return found


def _children_by_parent(pid: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError):
                stat = Path(f"/proc/{entry}/stat").read_text()
                if int(stat[stat.rindex(")") + 2 :].split()[1]) == pid:
                    found.append(int(entry))
    return found


def expected_stubs(config: dict[str, Any]) -> int:
    """How many stubs one loaded version of a model has if stubs run it: one an instance."""
    return sum(
        int(group.get("count", 1)) * max(1, len(group.get("gpus", [])))
        for group in config.get("instance_group", [])
    )


def missing(living: list[Stub], configs: dict[tuple[str, str], dict[str, Any]]) -> set[str]:
    """Models of which a stub is missing.

    Args:
        configs: of the versions that are ready and run by stubs, by (model, version).
    """
    count = Counter((stub.model, stub.version) for stub in living)
    return {key[0] for key, config in configs.items() if count[key] < expected_stubs(config)}


class DeathWatch:
    """Waits for the end of any of a set of processes, through pidfds where the system has them."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._descriptors: dict[Stub, int] = {}
        self._unwatched: list[Stub] = []

    def watch(self, stubs: list[Stub]) -> None:
        """Watch exactly these from now on."""
        for stub in set(self._descriptors) - set(stubs):
            descriptor = self._descriptors.pop(stub)
            self._poll.unregister(descriptor)
            os.close(descriptor)
        self._unwatched = []
        for stub in set(stubs) - set(self._descriptors):
            try:
                descriptor = os.pidfd_open(stub.pid)
            except OSError:  # it has just ended, or the system call is not allowed
                self._unwatched.append(stub)
                continue
            self._descriptors[stub] = descriptor
            self._poll.register(descriptor, select.POLLIN)

    def wait(self, timeout_s: float) -> bool:
        """True as soon as one of them has ended, False after `timeout_s`."""
        return bool(self._poll.poll(timeout_s * 1000)) or any(not stub.lives for stub in self._unwatched)

    def close(self) -> None:
        """Watch nothing any more."""
        self.watch([])
