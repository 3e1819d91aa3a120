"""python -m deploy.local_supervisor STATE_DIRECTORY

Runs the parts of `plan.json` in STATE_DIRECTORY, in order, each ready before the next; keeps them running, keeps their
logs short, and tells in `status.json` how they are. `python -m deploy up` starts it.

SIGHUP     reads the plan again: what changed is reloaded or started anew, what is gone is stopped
SIGTERM    stops all parts, the last one first, and ends
its death  the kernel sends each part SIGTERM (PR_SET_PDEATHSIG, prctl(2))
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from deploy.errors import DeployError
from deploy.local_parts import Part, Plan, why_not_ready, write_json
from serving.processes import start_time_ticks

PLAN, STATUS = "plan.json", "status.json"
TICK_S = 0.1
LOOK_S = 0.5
LOOK_AT_READY_S = 5.0
STEADY_S = 60.0
LONGEST_PAUSE_S = 30.0
KILLED_S = 5.0
LOG_BYTES = 16 << 20
ROTATE_S = 5.0
TAIL_LINES = 8
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)


class Stop(Exception):
    """SIGTERM or SIGINT arrived."""


def _stop(_signum: int, _frame: FrameType | None) -> None:
    raise Stop


def _die_with_supervisor() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


@dataclass
class Running:
    """A part that was started. `failures` counts its deaths since it last ran for STEADY_S."""

    part: Part
    process: subprocess.Popen[bytes]
    started_s: float
    ready: bool = False
    restarts: int = 0
    failures: int = 0
    resume_s: float = 0.0
    looked_s: float = 0.0
    since: float = field(default_factory=time.time)

    @property
    def dead(self) -> bool:
        """True if its process has ended."""
        return self.process.poll() is not None


class Supervisor:
    """Runs one plan after another from one state directory."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.running: dict[str, Running] = {}
        self.generation = 0
        self.phase = "applying"
        self.error = ""
        self._told = ""
        self._looked_s = 0.0
        self._rotated_s = 0.0

    def apply(self, plan: Plan) -> None:
        """Bring what runs in line with the plan. Raises DeployError if a part does not become ready."""
        self.generation, self.phase, self.error = plan.generation, "applying", ""
        wanted = {part.name: part for part in plan.parts}
        for name in reversed(list(self.running)):
            if name not in wanted or not wanted[name].same_process(self.running[name].part):
                self._end(self.running.pop(name))
        self.tell()
        for part in plan.parts:
            known = self.running.get(part.name)
            if known is None:
                self.running[part.name] = self._start(part)
            elif known.part != part:
                reload = known.part.files_sha256 != part.files_sha256
                known.part = part
                if reload and not known.dead:
                    known.ready = False
                    known.process.send_signal(signal.Signals[part.reload_signal])
                    time.sleep(TICK_S)
            else:
                continue
            self._wait_until_ready(self.running[part.name])
        self.running = {name: self.running[name] for name in wanted}
        self.phase = "settled"
        self.tell()

    def _start(self, part: Part) -> Running:
        descriptor = os.open(part.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "ab") as log:
            process = subprocess.Popen(
                part.argv,
                cwd=part.directory,
                env={**os.environ, **part.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_supervisor,
            )
        say(f"{part.name}: started, pid {process.pid}")
        return Running(part, process, time.monotonic())

    def _wait_until_ready(self, new: Running) -> None:
        part, deadline_s = new.part, time.monotonic() + new.part.ready_s
        self.tell()
        why = "it was not asked yet"
        while time.monotonic() < deadline_s:
            if new.dead:
                raise DeployError(f"{part.name} ended during its start, {ended(new)}.\n{log_tail(part)}")
            why = why_not_ready(part)
            if not why:
                new.ready, new.since = True, time.time()
                self.tell()
                return
            self.mend(but=part.name)
            time.sleep(TICK_S)
        raise DeployError(f"{part.name} is not ready after {part.ready_s:.0f} s ({why}).\n{log_tail(part)}")

    def mend(self, *, but: str = "") -> None:
        """Start dead parts again, after a pause that grows while they keep dying; look whether the others are ready."""
        now_s = time.monotonic()
        look = now_s - self._looked_s >= LOOK_S
        for name, one in self.running.items():
            if name == but:
                continue
            if one.dead:
                self._restart(one, now_s)
            elif look and (not one.ready or now_s - one.looked_s >= LOOK_AT_READY_S):
                one.looked_s = now_s
                ready = not why_not_ready(one.part)
                one.since = one.since if ready == one.ready else time.time()
                one.ready = ready
                if now_s - one.started_s > STEADY_S:
                    one.failures = 0
        if look:
            self._looked_s = now_s
            self.tell()
        if now_s - self._rotated_s >= ROTATE_S:
            self._rotated_s = now_s
            rotate(supervisor_log(self.state))
            for one in self.running.values():
                rotate(Path(one.part.log))
                if one.part.own_log and not one.dead and move_aside(Path(one.part.own_log)):
                    one.process.send_signal(signal.Signals[one.part.reopen_signal])

    def _restart(self, one: Running, now_s: float) -> None:
        if not one.resume_s:
            pause_s = min(LONGEST_PAUSE_S, 2.0**one.failures - 1)
            one.resume_s = now_s + pause_s
            one.ready, one.since = False, time.time()
            self._kill_group(one)  # nginx' workers outlive a killed master, and hold its port
            say(f"{one.part.name}: {ended(one)}; started again in {pause_s:.0f} s")
            self.tell()
        if now_s >= one.resume_s:
            fresh = self._start(one.part)
            one.process, one.started_s, one.resume_s = fresh.process, fresh.started_s, 0.0
            one.restarts += 1
            one.failures += 1
            self._looked_s = 0.0

    def _end(self, one: Running) -> None:
        say(f"{one.part.name}: stopping")
        if not one.dead:
            one.process.send_signal(signal.Signals[one.part.stop_signal])
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(one.part.stop_s)
        self._kill_group(one)
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.process.wait(KILLED_S)

    @staticmethod
    def _kill_group(one: Running) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(one.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Stop all parts, the last one first."""
        for name in reversed(list(self.running)):
            self._end(self.running.pop(name))
            self.tell()

    def tell(self) -> None:
        """Write `status.json`, if it would say something new."""
        told = {
            "generation": self.generation,
            "phase": self.phase,
            "error": self.error,
            "pid": os.getpid(),
            "parts": {
                name: {
                    "pid": one.process.pid,
                    "start_ticks": start_time_ticks(one.process.pid),
                    "ready": one.ready,
                    "since": round(one.since, 3),
                    "restarts": one.restarts,
                }
                for name, one in self.running.items()
            },
        }
        if repr(told) != self._told:
            self._told = repr(told)
            write_json(self.state / STATUS, told)


def supervisor_log(state: Path) -> Path:
    """The supervisor's own log."""
    return state / "logs" / "supervisor.log"


def say(message: str) -> None:
    """One line into the supervisor's log."""
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {message}", flush=True)


def ended(one: Running) -> str:
    """How its process ended, in words."""
    code = one.process.returncode
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def log_tail(part: Part) -> str:
    """The end of a part's log."""
    try:
        lines = Path(part.log).read_text(errors="replace").splitlines()[-TAIL_LINES:]
    except OSError:
        lines = []
    return "\n".join([f"The end of its log, {part.log}:", *("  " + line for line in lines)])


def rotate(log: Path, most_bytes: int = LOG_BYTES) -> None:
    """Cut a log that has grown over `most_bytes`, keeping what it held as `NAME.1`; who appends to it goes on writing."""
    try:
        if log.stat().st_size > most_bytes:
            shutil.copyfile(log, log.with_name(log.name + ".1"))
            with log.open("r+b") as file:
                file.truncate()
    except OSError as error:
        if log.exists():
            say(f"{log} cannot be rotated: {error}")


def move_aside(log: Path, most_bytes: int = LOG_BYTES) -> bool:
    """Rename a log that has grown over `most_bytes` to `NAME.1`; True if its owner has to open it anew. No line is lost."""
    try:
        if log.stat().st_size > most_bytes:
            log.replace(log.with_name(log.name + ".1"))
            return True
    except OSError as error:
        if log.exists():
            say(f"{log} cannot be renamed: {error}")
    return False


def supervise(state: Path) -> int:
    """Run the plan of a state directory until SIGTERM; returns the exit code: 1 if its first plan could not be started."""
    again = True

    def hear(_signum: int, _frame: FrameType | None) -> None:
        nonlocal again
        again = True

    supervisor = Supervisor(state)
    signal.signal(signal.SIGHUP, hear)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _stop)
    settled_once = False
    try:
        while True:
            if again:
                again = False
                try:
                    supervisor.apply(Plan.read(state / PLAN))
                    settled_once = True
                except (DeployError, OSError, ValueError) as error:
                    say(f"not applied: {error}")
                    supervisor.phase, supervisor.error = "failed", str(error)
                    if not settled_once:
                        return 1
                    supervisor.tell()
            supervisor.mend()
            time.sleep(TICK_S)
    except Stop:
        supervisor.phase = "stopping"
        return 0
    finally:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        supervisor.stop()
        supervisor.tell()
        say("ended")


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1])))
