"""Keeps one server proven: replaces dead stubs, restarts a dead server, and says meanwhile that it is not ready.

A stub that died     its model is loaded anew, or the server started again where that is faster (serving/replacement.py).
A server that died   is started again with the same ports, token and repository, after a growing pause if it does not
                     become ready.
No success           the same, if a public model has not been proven for HUNG_S (serving/probes.py).
Too many restarts    StartError: something else must look at it.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from serving.errors import ServingError, StartError
from serving.guarded_server import GuardedServer, Plan, log_tail
from serving.health import Health, now_utc
from serving.probes import Prober
from serving.replacement import StubKeeper
from serving.supervisor_metrics import SupervisorMetrics
from serving.triton_http import Refused, TritonHttp

TICK_S = 0.2
LOOK_TIMEOUT_S = 2.0
HUNG_S = 30.0
MOST_FAILED_STARTS = 5
MOST_RESTARTS, RESTARTS_WITHIN_S = 40, 600.0
LONGEST_PAUSE_S = 30.0
STOP_GRACE_S = 20.0
STOP_GRACE_AFTER_REPLACEMENT_S = 3.0  # it would wait 10 s for instances whose stubs are gone
STARTING_GRACE_S = 0.5
LOG_BYTES = 32 << 20
LOG_EVERY_S = 5.0


def say(message: str) -> None:
    """One line to the operator."""
    print(f"serving: {message}", file=sys.stderr, flush=True)


class Supervisor:
    """Runs the server of one plan, from its first start until `stop`."""

    def __init__(
        self,
        plan: Plan,
        health: Health,
        timeout_s: float,
        write_status: Callable[[str], None],
        metrics: SupervisorMetrics | None = None,
    ) -> None:
        self.plan = plan
        self.health = health
        self.timeout_s = timeout_s
        self._write_status = write_status
        self._metrics = metrics
        self._status = "starting"
        self._server: GuardedServer | None = None
        self._proven = False
        self._start_s = 0.0
        self._replaced = 0
        self._restarted_s: deque[float] = deque()
        self._logged_s = time.monotonic()

    def start(self, deadline_s: float, *, again: bool = False) -> list[str]:
        """Start and prove the server; returns the names of its models. Raises ServingError."""
        self._proven = False
        began_s = time.monotonic()
        self._server = GuardedServer(self.plan)
        models = self._server.prove(deadline_s, self.health.beat, again=again)
        self._proven, self._start_s = True, time.monotonic() - began_s
        if self._server.guardian.token_hidden is False:
            say("the admin token could not be hidden from /proc/<pid>/cmdline (see docs/serving.md)")
        return models

    def run(self, on_ready: Callable[[], None]) -> None:
        """Supervise the started server until a signal raises; raises StartError if it cannot be kept up.

        Args:
            on_ready: called once, when `/ready` says so for the first time.
        """
        while True:
            why = self._watch(on_ready)
            on_ready = _nothing
            self._restart(why)

    def stop(self) -> None:
        """Stop the server, if one runs; nothing of it is left when this returns."""
        self.health.set_server(False, "stopping")
        if self._server is None:
            return
        # While it loads models tritonserver hears no signal, and has nothing to finish either.
        ready_s = STOP_GRACE_AFTER_REPLACEMENT_S if self._replaced else STOP_GRACE_S
        self._server.stop(ready_s if self._proven and not self._server.exited else STARTING_GRACE_S)

    def _watch(self, on_ready: Callable[[], None]) -> str:
        """Supervise one life of the server; returns why it needs another one."""
        server = self._server
        assert server  # noqa: S101  set by `start`
        state = self.plan.state
        prober = Prober(TritonHttp(state.http, state.admin_token, timeout_s=LOOK_TIMEOUT_S), self.health)
        keeper: StubKeeper | None = None
        self._replaced = 0
        try:
            keeper = StubKeeper(server.pid, state, self.health, prober.doubt, self._start_s)
            prober.start()  # it names the public models first, as not proven yet
            self.health.set_server(True)
            while True:
                died = keeper.wait(TICK_S)
                self.health.beat()
                if server.guardian.exited.wait(TICK_S if died and not _lives(server) else 0):
                    return f"tritonserver ended ({server.how_it_ended()})"
                problem = keeper.look(died)
                self._replaced = keeper.replaced
                if problem:
                    return problem
                if prober.unproven_s() > HUNG_S:
                    return f"not proven for {HUNG_S:.0f} s: {self.health.reason}"
                self._tell()
                if self._metrics:
                    self._metrics.look(prober.public())
                if self.health.ready:
                    on_ready()
                    on_ready = _nothing
                self._rotate_log()
        except (OSError, Refused) as error:
            if server.guardian.exited.wait(TICK_S):
                return f"tritonserver ended ({server.how_it_ended()})"
            return f"tritonserver does not answer: {error}"
        finally:
            prober.stop()
            if keeper:
                keeper.close()

    def _tell(self, status: str | None = None) -> None:
        """Write the status into the state file, and say it, where it has changed."""
        status = status or ("ready" if self.health.ready else "not ready")
        starting = self._status in ("starting", "restarting")
        if status == self._status or (starting and status == "not ready"):
            return
        if self._status != "starting":
            self._say("ready again" if status == "ready" else f"{status}: {self.health.reason}")
        self._status = status
        self._write_status(status)

    def _say(self, message: str) -> None:
        """To the operator, and into the log: a launcher in the background has nobody to tell."""
        say(message)
        with contextlib.suppress(OSError), Path(self.plan.state.log).open("a") as log:
            log.write(f"{now_utc()} supervisor: {message}\n")

    def _restart(self, why: str) -> None:
        """Start the server again until it is proven. Raises StartError where that is hopeless."""
        self.health.set_server(False, why)
        self._tell("restarting")
        failures = 0
        while True:
            assert self._server  # noqa: S101  set by `start`
            self._server.stop(STARTING_GRACE_S)
            self._count_restart(why)
            pause_s = min(LONGEST_PAUSE_S, 2.0**failures - 1)
            resume_s = time.monotonic() + pause_s
            while time.monotonic() < resume_s:
                self.health.beat()
                time.sleep(TICK_S)
            try:
                self.plan.prepare()
                self.start(time.monotonic() + self.timeout_s, again=True)
                return
            except (ServingError, OSError) as error:
                failures += 1
                self._say(f"restart {failures} of {MOST_FAILED_STARTS} failed: {error}")
                self.health.set_server(False, f"{why}; restart {failures} failed: {error}")
                if failures >= MOST_FAILED_STARTS:
                    raise StartError(
                        f"{why}, and {failures} restarts failed, the last one so: {error}"
                    ) from error

    def _count_restart(self, why: str) -> None:
        now_s = time.monotonic()
        while self._restarted_s and now_s - self._restarted_s[0] > RESTARTS_WITHIN_S:
            self._restarted_s.popleft()
        if len(self._restarted_s) >= MOST_RESTARTS:
            raise StartError(
                f"{why}, and this was restarted {MOST_RESTARTS} times within {RESTARTS_WITHIN_S:.0f} s: "
                f"something kills it again and again.\n{log_tail(Path(self.plan.state.log))}"
            )
        self._restarted_s.append(now_s)
        self.health.restarts += 1

    def _rotate_log(self) -> None:
        """Keep the log below LOG_BYTES, and one older part beside it."""
        now_s = time.monotonic()
        if now_s - self._logged_s < LOG_EVERY_S:
            return
        self._logged_s = now_s
        log = Path(self.plan.state.log)
        try:
            if log.stat().st_size > LOG_BYTES:
                shutil.copyfile(log, log.with_suffix(".log.1"))
                with log.open("r+b") as file:
                    file.truncate()  # tritonserver appends: it goes on at the beginning
        except OSError as error:
            say(f"{log} cannot be rotated: {error}")


def _nothing() -> None:
    pass


def _lives(server: GuardedServer) -> bool:
    return Path(f"/proc/{server.pid}/task").exists()
