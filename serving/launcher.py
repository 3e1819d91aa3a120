"""Starting one tritonserver, proving it, waiting until it ends or is told to stop."""

from __future__ import annotations

import json
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from serving.errors import InstanceError, PortInUse, ServingError, StartError
from serving.instances import (
    InstanceState,
    instances,
    make_instance_directory,
    remove_remains,
    run_directory,
    state_path,
    write_state,
)
from serving.processes import INSTANCE_VARIABLE, start_time_ticks
from serving.repository import check_repository
from serving.tritonserver import (
    Addresses,
    command_line,
    compose,
    environment,
    find_tritonserver,
)

GUARDIAN = Path(__file__).resolve().parent / "guardian.py"
STOP_GRACE_S = 20.0
STARTING_GRACE_S = 0.5
CLEANING_S = 5.0
LOG_TAIL_LINES = 12


@dataclass(frozen=True)
class UpOptions:
    """What `serving up` was asked for. A port of 0 means a free one."""

    repository: Path
    home: Path
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    name: str | None = None
    tritonserver: str | None = None
    timeout_s: float = 120.0
    extra: list[str] = field(default_factory=list)


class Stopped(Exception):
    """SIGINT or SIGTERM arrived: `signum` says which."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def _raise_stopped(signum: int, _frame: FrameType | None) -> None:
    raise Stopped(signum)


def choose_ports(options: UpOptions) -> Addresses:
    """Check that the ports are free, and find free ones for 0.

    Raises PortInUse naming the port, or the address that this machine does not have.
    """
    wanted = {"http": options.http_port, "grpc": options.grpc_port, "metrics": options.metrics_port}
    asked = [port for port in wanted.values() if port]
    if len(set(asked)) < len(asked):
        raise PortInUse(f"the three ports must differ, not {asked}.")
    held, chosen = [], {}
    try:
        for what, port in sorted(wanted.items(), key=lambda item: item[1] == 0):
            holder = socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET)
            held.append(holder)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                holder.bind((options.host, port))
                holder.listen(1)
            except (OSError, OverflowError) as error:
                raise PortInUse(
                    f"{what} port {port} on {options.host} cannot be used: {error}. Stop what listens there, or choose "
                    f"another one: --{what}-port N (0 takes a free one)."
                ) from error
            chosen[what] = holder.getsockname()[1]
    finally:
        for holder in held:
            holder.close()
    return Addresses(options.host, chosen["http"], chosen["grpc"], chosen["metrics"])


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
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._end: dict[str, Any] | None = None
        self._write(json.dumps(order))
        threading.Thread(target=self._listen, daemon=True).start()

    def _write(self, line: str) -> None:
        assert self.process.stdin  # noqa: S101  opened above
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _listen(self) -> None:
        assert self.process.stdout  # noqa: S101  opened above
        for line in self.process.stdout:
            self.events.put(json.loads(line))
        self.events.put({"event": "ended", "returncode": None})

    def ended(self, timeout_s: float | None = 0.0) -> dict[str, Any] | None:
        """The event of the server's end, if it has come or comes within `timeout_s` (None: for ever)."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._end is None:
            try:
                wait_s = None if deadline is None else max(0.0, deadline - time.monotonic())
                event = self.events.get(timeout=wait_s) if wait_s != 0 else self.events.get_nowait()
            except queue.Empty:
                return None
            if event["event"] == "ended":
                self._end = event
        return self._end

    def stop(self, grace_s: float) -> None:
        """SIGTERM, SIGKILL after `grace_s`; returns when the server and all of its remains are gone."""
        try:
            self._write(f"stop {grace_s}")
        except OSError:
            return
        if self.ended(grace_s + CLEANING_S) is None:
            self.process.kill()


def up(options: UpOptions) -> int:
    """Start, prove, announce, and wait. Returns the exit code: 0 after a graceful stop.

    Raises ServingError if the server cannot be started or fails a proof; nothing of it is left then.
    """
    started = time.monotonic()
    repository = check_repository(options.repository)
    server = find_tritonserver(options.home, binary=options.tritonserver)
    run_directory(options.home).mkdir(parents=True, exist_ok=True)
    living = instances(options.home)
    addresses = choose_ports(options)
    name = options.name or str(addresses.http_port)
    path = state_path(options.home, name)
    if any(other.name == name for other in living):
        raise InstanceError(
            f"a server named {name} is up already; choose another --name, or `serving down --name {name}`."
        )
    instance_id = f"{os.getpid()}-{secrets.token_hex(3)}"
    own = make_instance_directory(options.home, instance_id)
    log = run_directory(options.home) / f"{name}.log"
    log.write_bytes(b"")
    state = InstanceState(
        name=name,
        instance_id=instance_id,
        status="starting",
        launcher_pid=os.getpid(),
        launcher_start_ticks=start_time_ticks(os.getpid()) or 0,
        directory=str(own),
        repository=str(repository),
        http=f"{options.host}:{addresses.http_port}",
        grpc=f"{options.host}:{addresses.grpc_port}",
        metrics=f"http://{options.host}:{addresses.metrics_port}/metrics",
        log=str(log),
        admin_token=secrets.token_urlsafe(24),
    )
    print(
        f"serving: starting {server.origin} tritonserver {server.binary} on {state.http}",
        file=sys.stderr,
        flush=True,
    )
    previous = {s: signal.signal(s, _raise_stopped) for s in (signal.SIGINT, signal.SIGTERM)}
    guardian: Guardian | None = None
    try:
        write_state(options.home, state)
        compose(server, repository, own)
        report = own / "proof.json"
        argv = command_line(server, own, addresses, instance_id, state.admin_token, options.extra)
        guardian = Guardian(
            {
                "argv": argv,
                "env": environment(server, instance_id, report),
                "log": str(log),
                "instance": instance_id,
                "state_file": str(path),
                "directory": str(own),
            }
        )
        models = _prove(guardian, state, report, started + options.timeout_s)
        state = replace(state, status="ready")
        write_state(options.home, state)
        _announce(state, models, server.origin, time.monotonic() - started)
        event = guardian.ended(None)
        raise StartError(f"tritonserver ended by itself ({_how(event)}).\n{_tail(log)}")
    except Stopped as stopped:
        print(
            f"serving: stopping {name} ({signal.Signals(stopped.signum).name})", file=sys.stderr, flush=True
        )
        return 0 if state.status == "ready" else 130
    finally:
        for signum in previous:
            signal.signal(signum, signal.SIG_IGN)
        if guardian is not None:
            # While it loads models tritonserver hears no signal, and has nothing to finish either.
            guardian.stop(STOP_GRACE_S if state.status == "ready" else STARTING_GRACE_S)
        remove_remains(options.home, state)
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _prove(guardian: Guardian, state: InstanceState, report: Path, deadline_s: float) -> list[str]:
    from serving.proof import Prover  # loads tritonclient while tritonserver starts

    def alive() -> None:
        event = guardian.ended()
        if event is not None:
            raise StartError(
                f"tritonserver ended during the start ({_how(event)}).\n{_tail(Path(state.log))}"
            )

    return Prover(state.http, state.admin_token, alive, Path(state.log), report).prove(deadline_s)


def _how(event: dict[str, Any] | None) -> str:
    code = (event or {}).get("returncode")
    if code is None:
        return "its guardian was killed"
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    told = [line for line in lines if line[:1] in "EF" or "rror" in line] or lines
    return "\n".join([f"The end of its log, {log}:", *("  " + line for line in told[-LOG_TAIL_LINES:])])


def _announce(state: InstanceState, models: list[str], origin: str, ready_s: float) -> None:
    print(f"serving: ready after {ready_s:.1f} s", file=sys.stderr)
    for what in ("http", "grpc", "metrics", "log"):
        print(f"  {what:8}{getattr(state, what)}", file=sys.stderr)
    print(f"  {'models':8}{', '.join(models)}", file=sys.stderr)
    print(
        f"  stop it with Ctrl-C or: python -m serving down --name {state.name}", file=sys.stderr, flush=True
    )
    print(json.dumps(announcement(state, models, origin, ready_s), separators=(",", ":")), flush=True)


def announcement(state: InstanceState, models: list[str], origin: str, ready_s: float) -> dict[str, Any]:
    """The JSON line of a ready server."""
    return {
        "status": "ready",
        "name": state.name,
        "http": state.http,
        "grpc": state.grpc,
        "metrics": state.metrics,
        "pid": state.launcher_pid,
        "log": state.log,
        "repository": state.repository,
        "server": origin,
        "models": models,
        "ready_s": round(ready_s, 3),
    }


def up_detached(arguments: list[str], home: Path, timeout_s: float) -> str:
    """Run `serving up` with `arguments` in the background; returns its JSON line once it is ready.

    Raises ServingError with the launcher's own error if it ends instead.
    """
    run_directory(home).mkdir(parents=True, exist_ok=True)
    errors_path = run_directory(home) / f"detached-{os.getpid()}-{secrets.token_hex(3)}.log"
    with errors_path.open("w+") as errors:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "serving", "up", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            text=True,
        )
        assert launcher.stdout  # noqa: S101  opened above
        timer = threading.Timer(timeout_s + STOP_GRACE_S, launcher.terminate)
        timer.start()
        try:
            line = launcher.stdout.readline()
        except BaseException:
            launcher.terminate()
            raise
        finally:
            timer.cancel()
        errors.seek(0)
        said = errors.read().strip()
    errors_path.unlink()
    if line:
        print(said, file=sys.stderr, flush=True)
        return line.strip()
    launcher.wait()
    raise ServingError(
        said.rpartition("error: ")[2] or f"the launcher ended with exit code {launcher.returncode}."
    )
