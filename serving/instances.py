"""Server instances of this checkout: one state file each, below `.triton/run/`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from serving.errors import InstanceError
from serving.processes import processes_of, shared_memory_of, start_time_ticks, sweep

PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+,@=-]+")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}")


@dataclass(frozen=True)
class InstanceState:
    """What the state file of one instance says. `launcher_start_ticks` tells a reused pid from the launcher."""

    name: str
    instance_id: str
    status: str  # starting, ready, not ready, restarting
    launcher_pid: int
    launcher_start_ticks: int
    directory: str
    repository: str
    http: str
    grpc: str
    metrics: str
    health: str
    log: str
    admin_token: str
    grpc_tls: str = "off"  # off, server, mutual

    @property
    def launcher_lives(self) -> bool:
        """True while the process that started the instance runs."""
        return start_time_ticks(self.launcher_pid) == self.launcher_start_ticks


def run_directory(home: Path) -> Path:
    """Directory of the state files, logs and composed backends."""
    return home / "run"


def make_run_directory(home: Path) -> None:
    """Make it, for its owner alone: logs and state files lie in it."""
    run_directory(home).mkdir(mode=0o700, parents=True, exist_ok=True)


def make_instance_directory(home: Path, instance_id: str) -> Path:
    """A directory for the links that one server needs, whose path no shell can misread.

    Triton's Python backend starts its stubs through `bash -c` with unquoted paths: a space in the path of the
    repository or of the backends breaks them. So the server is given links in this directory, which lies below
    `.triton/run/`, or in the directory for temporary files if that path has such a character itself.
    """
    for parent in (run_directory(home), Path(tempfile.gettempdir()), Path("/tmp")):  # nosec B108  # noqa: S108
        if PLAIN_PATH.fullmatch(str(parent)):
            directory = parent / f"clotline-{instance_id}"
            directory.mkdir(mode=0o700)
            return directory
    raise InstanceError("no directory for temporary files has a path without spaces; set TMPDIR to one.")


def state_path(home: Path, name: str) -> Path:
    """State file of an instance; raises InstanceError for a name that is no file name."""
    if not NAME.fullmatch(name):
        raise InstanceError(f"{name!r} is no instance name: letters, digits, `.`, `_` and `-`, at most 41.")
    return run_directory(home) / f"{name}.json"


def write_state(home: Path, state: InstanceState) -> None:
    """Write the state file whole, readable by its owner only (it holds the admin token)."""
    path = state_path(home, state.name)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(asdict(state), file)
    aside.replace(path)


def instances(home: Path) -> list[InstanceState]:
    """Instances whose launcher or server still lives. Remains of dead ones are swept up on the way."""
    living = []
    for path in sorted(run_directory(home).glob("*.json")):
        try:
            state = InstanceState(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue
        if state.launcher_lives:
            living.append(state)
        else:
            remove_remains(home, state)
    return living


def remove_remains(home: Path, state: InstanceState) -> None:
    """Kill and delete what a dead instance left behind, its log excepted."""
    sweep(state.instance_id)
    shutil.rmtree(state.directory, ignore_errors=True)
    path = state_path(home, state.name)
    try:
        if json.loads(path.read_text()).get("instance_id") == state.instance_id:
            path.unlink()
    except (OSError, ValueError):
        pass


def stop_instance(home: Path, state: InstanceState, timeout_s: float) -> bool:
    """Ask the launcher to stop its server and wait for it. Returns True if nothing of it is left.

    After `timeout_s` seconds launcher, server and stubs are killed.
    """
    if state.launcher_lives:
        os.kill(state.launcher_pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while state.launcher_lives and time.monotonic() < deadline:
        time.sleep(0.05)
    if state.launcher_lives:
        os.kill(state.launcher_pid, signal.SIGKILL)
    remove_remains(home, state)
    return not processes_of(state.instance_id) and not shared_memory_of(state.instance_id)
