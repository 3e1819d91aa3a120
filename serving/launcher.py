"""Starting one tritonserver, proving it, waiting until it ends or is told to stop."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from serving.errors import InstanceError, ServingError, UsageError
from serving.guarded_server import Plan
from serving.health import Health, HealthServer
from serving.instances import (
    InstanceState,
    instances,
    make_instance_directory,
    make_run_directory,
    remove_remains,
    run_directory,
    state_path,
    write_state,
)
from serving.ports import choose_ports
from serving.processes import start_time_ticks
from serving.repository import check_repository
from serving.supervisor import STOP_GRACE_S, Supervisor, say
from serving.supervisor_metrics import SupervisorMetrics
from serving.tritonserver import Addresses, Security, TritonServer, find_tritonserver

LIVE_BUSY_S = 3.0


@dataclass(frozen=True)
class UpOptions:
    """What `serving up` was asked for. A port of 0 means a free one; one of `repository`, `live`, `release` is given."""

    home: Path
    repository: Path | None = None
    live: Path | None = None
    release: Path | None = None
    host: str = "127.0.0.1"
    http_host: str | None = None
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    health_port: int | None = None
    name: str | None = None
    tritonserver: str | None = None
    timeout_s: float = 120.0
    security: Security = field(default_factory=Security)
    extra: list[str] = field(default_factory=list)


class Stopped(Exception):
    """SIGINT or SIGTERM arrived: `signum` says which."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def _raise_stopped(signum: int, _frame: FrameType | None) -> None:
    raise Stopped(signum)


def up(options: UpOptions) -> int:
    """Start, prove, announce, and supervise. Returns the exit code: 0 after a graceful stop.

    Raises ServingError if the server cannot be started, fails a proof, or cannot be kept up; nothing of it is left then.
    """
    started = time.monotonic()
    options.security.check()
    server = find_tritonserver(options.home, binary=options.tritonserver)
    make_run_directory(options.home)
    living = instances(options.home)
    addresses, ports = choose_ports(options)
    with ports:  # for as long as a server may be started there again
        return _up(options, server, living, addresses, started)


def _up(
    options: UpOptions,
    server: TritonServer,
    living: Sequence[InstanceState],
    addresses: Addresses,
    started: float,
) -> int:
    name = options.name or str(addresses.http_port)
    path = state_path(options.home, name)
    if any(other.name == name for other in living):
        raise InstanceError(
            f"a server named {name} is up already; choose another --name, or `serving down --name {name}`."
        )
    instance_id = f"{os.getpid()}-{secrets.token_hex(3)}"
    own = make_instance_directory(options.home, instance_id)
    try:
        repository, prepare = _repository(options, own, server)
        health = Health()
        metrics = SupervisorMetrics(health, repository, instance_id)
        health_server = HealthServer(health, addresses.host, addresses.health_port, metrics.text)
    except BaseException:
        shutil.rmtree(own)
        raise
    log = run_directory(options.home) / f"{name}.log"
    os.close(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    state = InstanceState(
        name=name,
        instance_id=instance_id,
        status="starting",
        launcher_pid=os.getpid(),
        launcher_start_ticks=start_time_ticks(os.getpid()) or 0,
        directory=str(own),
        repository=str(repository),
        http=f"{addresses.http_host}:{addresses.http_port}",
        grpc=f"{options.host}:{addresses.grpc_port}",
        metrics=f"http://{options.host}:{addresses.metrics_port}/metrics",
        health=f"http://{options.host}:{addresses.health_port}",
        log=str(log),
        admin_token=secrets.token_urlsafe(24),
        grpc_tls=options.security.grpc_tls,
    )
    say(f"starting {server.origin} tritonserver {server.binary} on {state.http}")
    plan = Plan(server, state, path, addresses, options.security, options.extra, prepare)
    supervisor = Supervisor(
        plan,
        health,
        options.timeout_s,
        lambda status: write_state(options.home, replace(state, status=status)),
        metrics,
    )
    previous = {s: signal.signal(s, _raise_stopped) for s in (signal.SIGINT, signal.SIGTERM)}
    announced = False

    def announce() -> None:
        nonlocal announced
        announced = True
        _announce(state, models, server.origin, time.monotonic() - started)

    try:
        write_state(options.home, state)
        models = supervisor.start(started + options.timeout_s)
        supervisor.run(announce)
        raise AssertionError("the supervisor only ends by an exception")
    except Stopped as stopped:
        say(f"stopping {name} ({signal.Signals(stopped.signum).name})")
        return 0 if announced else 130
    finally:
        for signum in previous:
            signal.signal(signum, signal.SIG_IGN)
        supervisor.stop()
        health_server.close()
        remove_remains(options.home, state)
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _repository(options: UpOptions, own: Path, server: TritonServer) -> tuple[Path, Callable[[], None]]:
    """The repository to serve, and what must be done before tritonserver is started on it again."""
    if options.repository and (options.live or options.release):
        raise UsageError(
            "--repository serves a directory as it is; --live and --release serve Releases: not both."
        )
    if options.repository:
        return check_repository(options.repository), lambda: None
    if not (options.live or options.release):
        raise UsageError("say what to serve: --repository DIR, or --release RELEASE, or --live DIR.")
    from serving.releases.errors import LiveBusy
    from serving.releases.preparing import prepare

    live = options.live or own / "live"

    def prepare_again() -> None:
        deadline_s = time.monotonic() + LIVE_BUSY_S
        while time.monotonic() < deadline_s:
            try:
                prepare(live, tritonserver=server)
                return
            except LiveBusy:  # a release is at work: it holds the directory for moments only
                time.sleep(0.1)

    return check_repository(prepare(live, options.release, tritonserver=server)), prepare_again


def _announce(state: InstanceState, models: list[str], origin: str, ready_s: float) -> None:
    say(f"ready after {ready_s:.1f} s")
    for what in ("http", "grpc", "metrics", "health", "log"):
        print(f"  {what:8}{getattr(state, what)}", file=sys.stderr)
    print(f"  {'models':8}{', '.join(models)}", file=sys.stderr)
    print(
        f"  stop it with Ctrl-C or: python -m serving down --name {state.name}", file=sys.stderr, flush=True
    )
    line = announcement(state, models, origin, ready_s)
    print(json.dumps(line, separators=(",", ":")), flush=True)


def announcement(state: InstanceState, models: list[str], origin: str, ready_s: float) -> dict[str, Any]:
    """The JSON line of a ready server."""
    return {
        "status": "ready",
        "name": state.name,
        "http": state.http,
        "grpc": state.grpc,
        "grpc_tls": state.grpc_tls,
        "metrics": state.metrics,
        "health": state.health,
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
    make_run_directory(home)
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
