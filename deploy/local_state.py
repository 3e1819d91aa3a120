"""What a stack has on this machine: its state directory, and all of its processes, found by marks of its own.

    STATE/                .triton/deploy, or --state DIR; 0700
      stack.json          settings and identity; there while a stack is up
      plan.json           what the supervisor is to run         status.json   how that is
      logs/               one a part, cut at 16 MB
      tls/ keys/          certificate and API keys: kept when the stack goes down
      data/               of Prometheus and Alertmanager: kept too

Each process carries `CLOTLINE_INSTANCE=<id>` in its environment, as those of `serving` do. nginx overwrites its
environment with its title, so its processes are known by their session, whose number is the pid that was recorded, and
by the state directory, which they work in.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.errors import DeployError
from deploy.local_parts import write_json
from deploy.local_supervisor import PLAN, STATUS
from serving.embedded import triton_home
from serving.instances import instances, stop_instance
from serving.processes import processes_of, start_time_ticks, sweep

STACK = "stack.json"
LOCK = "lock"
SERVER_STOP_S = 30.0
CANDIDATE = "candidate"
BEGUN = "candidate.json"
RUN_TIME = (STACK, PLAN, STATUS, "run", "live", CANDIDATE, BEGUN, "prometheus", "alertmanager")


def candidate_of(server_name: str) -> str:
    """Name of the tritonserver that serves a candidate beside one of this name, among the instances of `serving`."""
    return f"{server_name}-{CANDIDATE}"


@dataclass(frozen=True)
class Stack:
    """A stack that is up, or was: `stack.json`.

    Attributes:
        instance_id: the mark of its processes.
        supervisor_pid, supervisor_start_ticks: together they name its supervisor for good.
        server_name: of its tritonserver among the instances of `serving`.
        settings: what it was started with, as `LocalSettings` writes itself.
    """

    instance_id: str
    supervisor_pid: int
    supervisor_start_ticks: int
    server_name: str
    settings: dict[str, Any]

    @property
    def lives(self) -> bool:
        """True while its supervisor runs."""
        return start_time_ticks(self.supervisor_pid) == self.supervisor_start_ticks


def make_state(state: Path) -> None:
    """Make the directory, for its owner alone. Raises DeployError if it is not ours alone."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = state.stat()
    if found.st_uid != os.geteuid():
        raise DeployError(f"{state} belongs to another user; choose a directory of your own with --state.")
    if found.st_mode & 0o077:
        state.chmod(0o700)
    (state / "logs").mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def holding(state: Path) -> Iterator[None]:
    """One `up` or `down` at a time. Raises DeployError if another one is at work."""
    descriptor = os.open(state / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DeployError(
                f"another `python -m deploy up` or `down` is at work on {state}; wait for it."
            ) from error
        yield
    finally:
        os.close(descriptor)


def read_stack(state: Path) -> Stack | None:
    """The stack of a state directory, None if there is none; its supervisor may be dead."""
    try:
        return Stack(**json.loads((state / STACK).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_stack(state: Path, stack: Stack) -> None:
    """Write `stack.json`."""
    write_json(state / STACK, stack.__dict__)


def read_status(state: Path) -> dict[str, Any]:
    """What the supervisor told last; {} if it told nothing."""
    try:
        return dict(json.loads((state / STATUS).read_text()))
    except (OSError, ValueError):
        return {}


def sessions_of(state: Path) -> list[int]:
    """Pids of the living processes that lead, or are in, a recorded part's session and work in the state directory."""
    recorded = {part["pid"] for part in read_status(state).get("parts", {}).values()}
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            stat = Path(f"/proc/{entry}/stat").read_text()
            session = int(stat[stat.rindex(")") + 2 :].split()[3])
            works_in = os.readlink(f"/proc/{entry}/cwd")
        except (OSError, ValueError):
            continue
        if session in recorded and works_in == str(state):
            found.append(int(entry))
    return found


def processes_of_stack(state: Path, stack: Stack) -> list[int]:
    """Pids of all of its living processes but those of tritonserver, which `serving` knows."""
    return sorted({*processes_of(stack.instance_id), *sessions_of(state)})


def stop_stack(state: Path, stack: Stack, timeout_s: float) -> bool:
    """Stop a stack, gracefully if its supervisor lives. Returns True if no process of it is left.

    After `timeout_s` seconds what is left is killed. Certificate, keys, data and logs stay.
    """
    if stack.lives:
        os.kill(stack.supervisor_pid, signal.SIGTERM)
    deadline_s = time.monotonic() + timeout_s
    while stack.lives and time.monotonic() < deadline_s:
        time.sleep(0.05)
    names = {stack.server_name, candidate_of(stack.server_name)}
    servers = [server for server in instances(triton_home()) if server.name in names]
    clean = all([stop_instance(triton_home(), server, SERVER_STOP_S) for server in servers])
    for pid in sessions_of(state):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    sweep(stack.instance_id)
    clean = clean and not processes_of_stack(state, stack)
    remove_run_time(state)
    return clean


def remove_run_time(state: Path) -> None:
    """Remove what belongs to a running stack alone."""
    for name in RUN_TIME:
        path = state / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
