"""What a server instance leaves in the system, found and removed by its own marks alone. Standard library only.

Every process of an instance carries `CLOTLINE_INSTANCE=<id>` in its environment (Triton's Python stubs inherit it
from tritonserver), and every shared-memory region of Triton's Python backend starts with the instance's prefix
(`--backend-config=python,shm-region-prefix-name=<prefix>`). So nothing of anybody else is ever touched.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

INSTANCE_VARIABLE = "CLOTLINE_INSTANCE"
SHARED_MEMORY = Path("/dev/shm")  # nosec B108  # noqa: S108  Linux' POSIX shared memory, where Triton's stubs put theirs


def interrupt(process: subprocess.Popen[Any], patience_s: float) -> None:
    """SIGINT to a child that leads a session and to what it started, as Ctrl-C in a terminal would; later SIGKILL."""
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def shared_memory_prefix(instance_id: str) -> str:
    """Start of the name of every shared-memory region of the instance."""
    return f"clotline_{instance_id}_"


def start_time_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (proc(5), field 22), None if there is no such process.

    Together with the pid it names a process for good: pids are used again, (pid, start time) is not.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] == "Z" else int(fields[19])


def processes_of(instance_id: str) -> list[int]:
    """Pids of the living processes whose environment carries the instance's mark, this process left out."""
    mark = f"{INSTANCE_VARIABLE}={instance_id}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            environment = Path(f"/proc/{entry}/environ").read_bytes()
        except OSError:
            continue
        if mark in environment.split(b"\0") and start_time_ticks(int(entry)) is not None:
            found.append(int(entry))
    return found


def memory_bytes(pids: Iterable[int], kinds: tuple[str, ...] = ("Pss:",)) -> int | None:
    """Proportional memory of processes (proc(5), `smaps_rollup`), of these kinds of it; None where it cannot be read."""
    total_kb = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup") as lines:
                total_kb += sum(int(line.split()[1]) for line in lines if line.startswith(kinds))
        except (OSError, ValueError):
            continue
    return total_kb * 1024 or None


def shared_memory_of(instance_id: str) -> list[Path]:
    """Shared-memory regions of the instance."""
    return sorted(SHARED_MEMORY.glob(shared_memory_prefix(instance_id) + "*"))


def sweep(instance_id: str) -> None:
    """Kill what is left of the instance's processes, then remove its shared memory."""
    deadline = time.monotonic() + 2.0
    while (pids := processes_of(instance_id)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    for region in shared_memory_of(instance_id):
        with contextlib.suppress(OSError):
            region.unlink()


def overwrite_argument(pid: int, secret: str) -> bool:
    """Replace `secret` by stars in the command line that others see of a process. False if that is not allowed.

    Linux shows the memory of the process itself as its command line (proc(5)); writing there takes the right to trace
    the process, which a parent with the same user has unless kernel.yama.ptrace_scope is 2 or more.
    """
    try:
        offset = Path(f"/proc/{pid}/cmdline").read_bytes().index(secret.encode())
        while offset >= 0:
            stat = Path(f"/proc/{pid}/stat").read_text()
            arg_start = int(stat[stat.rindex(")") + 2 :].split()[45])
            with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
                memory.seek(arg_start + offset)
                memory.write(b"*" * len(secret.encode()))
            offset = Path(f"/proc/{pid}/cmdline").read_bytes().find(secret.encode())
    except (OSError, ValueError):
        return False
    return True
