"""One life of a tritonserver: composed, started under a guardian, proven, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.errors import StartError
from serving.instances import InstanceState
from serving.processes import INSTANCE_VARIABLE, sweep
from serving.tritonserver import Addresses, Security, TritonServer, command_line, compose, environment

GUARDIAN = Path(__file__).resolve().parent / "guardian.py"
CLEANING_S = 5.0
LOG_TAIL_LINES = 12


@dataclass(frozen=True)
class Plan:
    """What every life of an instance's server starts from."""

    server: TritonServer
    state: InstanceState
    state_file: Path
    addresses: Addresses
    security: Security
    extra: list[str]
    prepare: Callable[[], None]  # brings the repository in order before a restart


class Guardian:
    """The child process that runs tritonserver and cleans up after it (serving/guardian.py)."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(GUARDIAN)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, INSTANCE_VARIABLE: order["instance"]},
            start_new_session=True,
            text=True,
        )
        self.server_pid = 0
        self.token_hidden: bool | None = None
        self.returncode: int | None = None  # of tritonserver; None: the guardian was killed
        self.exited = threading.Event()  # tritonserver has ended
        self.ended = threading.Event()  # and all that it left behind is gone
        with contextlib.suppress(OSError):  # killed already: `ended` will say so
            self._write(json.dumps(order))
        threading.Thread(target=self._listen, daemon=True).start()

    def _write(self, line: str) -> None:
        assert self.process.stdin  # noqa: S101  opened above
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _listen(self) -> None:
        assert self.process.stdout  # noqa: S101  opened above
        for line in self.process.stdout:
            event = json.loads(line)
            if event["event"] == "started":
                self.server_pid = event["pid"]
            elif event["event"] == "hidden":
                self.token_hidden = event["hidden"]
            elif event["event"] == "exited":
                self.returncode = event["returncode"]
                self.exited.set()
        self.exited.set()
        self.process.wait()
        self.ended.set()

    def stop(self, grace_s: float) -> None:
        """SIGTERM, SIGKILL after `grace_s`; returns when the server and all of its remains are gone."""
        with contextlib.suppress(OSError):
            self._write(f"stop {grace_s}")
        if not self.ended.wait(grace_s + CLEANING_S):
            self.process.kill()
            self.ended.wait(CLEANING_S)


class GuardedServer:
    """One tritonserver that was started."""

    def __init__(self, plan: Plan) -> None:
        """Compose its directory anew and start it. Raises OSError if the directory cannot be written."""
        self.plan = plan
        state = plan.state
        self.directory = Path(state.directory)
        compose(plan.server, Path(state.repository), self.directory)
        self.proof_report = self.directory / "proof.json"
        argv = command_line(
            plan.server, self.directory, plan.addresses, state.instance_id, state.admin_token,
            plan.security, plan.extra,
        )  # fmt: skip
        self.guardian = Guardian(
            {
                "argv": argv,
                "env": environment(plan.server, state.instance_id, self.proof_report),
                "log": state.log,
                "instance": state.instance_id,
                "state_file": str(plan.state_file),
                "directory": state.directory,
                "secret": state.admin_token,
            }
        )

    @property
    def pid(self) -> int:
        """Process id of tritonserver, 0 until it runs."""
        return self.guardian.server_pid

    @property
    def exited(self) -> bool:
        """True once tritonserver or its guardian has ended."""
        return self.guardian.exited.is_set()

    def how_it_ended(self) -> str:
        """In words."""
        code = self.guardian.returncode
        if code is None:
            return "its guardian was killed"
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"

    def prove(self, deadline_s: float, waiting: Callable[[], None], *, again: bool = False) -> list[str]:
        """Wait until it is up, and prove it (serving/proof.py); returns the names of its models.

        Args:
            deadline_s: on the clock of time.monotonic().
            waiting: called again and again meanwhile.
            again: this is a restart.
        """
        from serving.proof import Prover  # loads tritonclient while tritonserver starts

        log = Path(self.plan.state.log)

        def alive() -> None:
            waiting()
            if self.exited:
                raise StartError(
                    f"tritonserver ended during the start ({self.how_it_ended()}).\n{log_tail(log)}"
                )

        state = self.plan.state
        return Prover(state.http, state.admin_token, alive, log, self.proof_report).prove(
            deadline_s, again=again
        )

    def stop(self, grace_s: float) -> None:
        """Stop it; nothing of it is left when this returns."""
        self.guardian.stop(grace_s)
        sweep(self.plan.state.instance_id)


def log_tail(log: Path) -> str:
    """The end of a server's log, errors first of all."""
    lines = log.read_text(errors="replace").splitlines()
    told = [line for line in lines if line[:1] in "EF" or "rror" in line] or lines
    return "\n".join([f"The end of its log, {log}:", *("  " + line for line in told[-LOG_TAIL_LINES:])])
