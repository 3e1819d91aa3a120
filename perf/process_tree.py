"""CPU time of a process and of all that descends from it, read from /proc (proc(5): fields of `stat`)."""

from __future__ import annotations

import os
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_PROC = Path("/proc")


def descendants(pid: int, proc: Path = _PROC) -> list[int]:
    """The process itself and every living one below it, parents first."""
    children: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit():
            fields = _stat(entry)
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def cpu_s(pids: list[int], proc: Path = _PROC) -> float:
    """User and system seconds that these processes have used so far; those that have ended count as 0."""
    return sum(
        (int(fields[11]) + int(fields[12])) / TICKS_PER_S
        for fields in (_stat(proc / str(pid)) for pid in pids)
        if fields
    )


def _stat(entry: Path) -> list[str]:
    """The fields of `stat` after the command's name: state, ppid, ...; none for a process that has gone."""
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
