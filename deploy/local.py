"""Bringing the guarded service up on this machine, changing it, and taking it down again."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploy import certificates
from deploy.errors import DeployError
from deploy.gateway import remove_scratch, worker_pids
from deploy.keys import Limits
from deploy.live_directory import bring_in, serves
from deploy.local_candidate import bring_in_candidate, remove_candidate, wait_for_end
from deploy.local_parts import Plan
from deploy.local_plan import LocalPlan, check_programs
from deploy.local_settings import LOOPBACK, PORT_NAMES, LocalSettings, Ports
from deploy.local_state import (
    Stack,
    holding,
    make_state,
    processes_of_stack,
    read_stack,
    read_status,
    stop_stack,
    write_stack,
)
from deploy.local_supervisor import PLAN, supervisor_log
from serving.embedded import CHECKOUT
from serving.ports import HeldPorts
from serving.processes import INSTANCE_VARIABLE, start_time_ticks

STOP_S = 60.0
FOLLOW_S = 0.1
FIRST_CLIENT = "first"


def say(message: str) -> None:
    """One line to the operator."""
    print(f"deploy: {message}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Order:
    """What `up` was told: settings that are None, and ports that are not named, stay as they are."""

    state: Path
    settings: dict[str, Any]
    ports: dict[str, int]


def up(order: Order) -> dict[str, Any]:
    """Bring the stack of a state directory up, or change what differs from what runs; returns what there is to know of it.

    Raises DeployError, or ServingError of what is served, if that fails. A stack that was not up is not there then, one
    that was up is as it was before.
    """
    check_programs()
    there = set(os.listdir(order.state)) if order.state.is_dir() else set()
    make_state(order.state)
    with holding(order.state):
        stack = read_stack(order.state)
        if stack and stack.lives:
            return _change(order, stack)
        if stack:
            say("what an earlier stack left behind is removed first")
            stop_stack(order.state, stack, STOP_S)
        try:
            return _start(order)
        except BaseException:
            _remove_but(order.state, {*there, "logs"})
            raise


def _start(order: Order) -> dict[str, Any]:
    started_s = time.monotonic()
    settings = LocalSettings().changed(order.settings, order.ports).with_source()
    with _held(settings, settings, all_of_them=True) as ports:  # until all of the stack listens
        return _start_on(order, replace(settings, ports=_with(settings, ports)), started_s)


def _start_on(order: Order, settings: LocalSettings, started_s: float) -> dict[str, Any]:
    state = order.state
    plan = LocalPlan(state, settings)
    stack = Stack(f"{os.getpid()}-{secrets.token_hex(3)}", 0, 0, plan.server_name, settings.as_json())
    try:
        write_stack(state, stack)
        certificates.make(plan.certificate.directory, plan.certificate_names)
        if not settings.repository:
            bring_in(plan.live, Path(settings.release) if settings.release else None)
        key_file = _make_first_key(plan)
        plan.write_files()
        Plan(1, plan.parts()).write(state / PLAN)
        stack = _supervise(state, stack)
        _follow(state, stack, 1)
    except BaseException:
        say("rolled back: nothing of this start is left running")
        stop_stack(state, stack, STOP_S)
        remove_scratch(plan.gateway)
        raise
    took_s = time.monotonic() - started_s
    say(f"all ready after {took_s:.1f} s; stop it with: python -m deploy down")
    return _ready(plan, stack, key_file, took_s, changed=[part.name for part in plan.parts()])


def _change(order: Order, stack: Stack) -> dict[str, Any]:
    """Bring a stack that is up in line with an order."""
    started_s = time.monotonic()
    state = order.state
    before = LocalSettings.from_json(stack.settings)
    settings = before.changed(order.settings, {name: port for name, port in order.ports.items() if port})
    with _held(settings, before, all_of_them=False) as ports:
        settings = replace(settings, ports=_with(settings, ports))
    old, new = LocalPlan(state, before), LocalPlan(state, settings)
    running = Plan.read(state / PLAN)
    generations = itertools.count(running.generation + 1)
    certificates.make(new.certificate.directory, new.certificate_names)
    key_file = _make_first_key(new)
    try:
        moved = not settings.repository and (before.repository or new.live != old.live)
        if moved:
            bring_in(new.live, Path(settings.release) if settings.release else None)
        if settings.candidate and not before.candidate:
            bring_in_candidate(new)
        elif before.candidate and not settings.candidate:
            old_workers = worker_pids(old.gateway / "nginx.conf")
            unasked = LocalPlan(state, replace(before, canary_percent=0.0, shadow_percent=0.0))
            unasked.write_files()
            if unasked.parts() != running.parts:  # else nothing was asked of it any more
                _apply(state, stack, Plan(next(generations), unasked.parts()))
                wait_for_end(old_workers, say)
        new.write_files()
        parts = new.parts()
        known = {part.name: part for part in running.parts}
        changed = [part.name for part in parts if known.get(part.name) != part]
        changed += [name for name in known if name not in {part.name for part in parts}]
        if changed:
            say(f"it is up; what has changed: {', '.join(changed)}")
            _apply(state, stack, Plan(next(generations), parts))
        else:
            _follow(state, stack, running.generation)  # an `up` that was killed may have left it on its way
        if order.settings.get("release") and not moved:
            served = serves(new.live)
            _release(new, Path(str(settings.release)))
            changed += ["release"] if serves(new.live) != served else []
    except BaseException:
        say("that failed; what ran before is put back")
        old.write_files()
        with contextlib.suppress(DeployError):
            _apply(state, stack, Plan(next(generations), old.parts()))
        if not before.candidate:
            remove_candidate(old)
        raise
    if not settings.candidate:
        remove_candidate(new)
    write_stack(state, replace(stack, server_name=new.server_name, settings=settings.as_json()))
    took_s = time.monotonic() - started_s
    say("it is up" + (f", changed within {took_s:.1f} s" if changed else "; nothing has changed"))
    return _ready(new, stack, key_file, took_s, changed=changed)


def _held(settings: LocalSettings, before: LocalSettings, *, all_of_them: bool) -> HeldPorts:
    """The ports that a running stack has not yet, held; free ones for 0."""
    mine = {
        name
        for name in settings.used_ports
        if all_of_them
        or name not in before.used_ports
        or getattr(settings.ports, name) != getattr(before.ports, name)
    }
    if settings.gateway_host != before.gateway_host:
        mine.discard("gateway")  # its own port on another address
    hosts = {name: settings.gateway_host if name == "gateway" else LOOPBACK for name in PORT_NAMES}
    return HeldPorts(
        {n.replace("_", "-"): (hosts[n], getattr(settings.ports, n)) for n in PORT_NAMES if n in mine}
    )


def _with(settings: LocalSettings, held: HeldPorts) -> Ports:
    return replace(settings.ports, **{name.replace("-", "_"): port for name, port in held.numbers.items()})


def _supervise(state: Path, stack: Stack) -> Stack:
    """Start the supervisor, in a session of its own."""
    descriptor = os.open(supervisor_log(state), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.local_supervisor", str(state)],
            cwd=CHECKOUT,
            env={**os.environ, INSTANCE_VARIABLE: stack.instance_id},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    stack = replace(
        stack, supervisor_pid=process.pid, supervisor_start_ticks=start_time_ticks(process.pid) or 0
    )
    write_stack(state, stack)
    return stack


def _apply(state: Path, stack: Stack, plan: Plan) -> None:
    plan.write(state / PLAN)
    with contextlib.suppress(ProcessLookupError):
        os.kill(stack.supervisor_pid, signal.SIGHUP)
    _follow(state, stack, plan.generation)


def _follow(state: Path, stack: Stack, generation: int) -> None:
    """Say which parts become ready until the plan is settled. Raises DeployError with the supervisor's words if it fails."""
    said = {name: (part["pid"], part["ready"]) for name, part in read_status(state).get("parts", {}).items()}
    started_s = time.monotonic()
    while True:
        ended = not stack.lives
        status = read_status(state)
        if status.get("generation") == generation:
            for name, part in status["parts"].items():
                now = (part["pid"], part["ready"])
                if said.get(name) != now and part["ready"]:
                    say(f"{name} is ready ({time.monotonic() - started_s:.1f} s)")
                said[name] = now
            if status["phase"] == "settled":
                return
            if status["error"]:
                raise DeployError(status["error"])
        if ended:
            raise DeployError(f"the supervisor ended; its log is {supervisor_log(state)}.")
        time.sleep(FOLLOW_S)


def _ready(
    plan: LocalPlan, stack: Stack, key_file: Path | None, took_s: float, *, changed: list[str]
) -> dict[str, Any]:
    """What `up` ends with."""
    status = read_status(plan.state)
    return {
        "status": "ready",
        "url": plan.url,
        "ca": str(plan.certificate.ca),
        "addresses": {part.name: part.address for part in plan.parts()},
        "server": plan.server_name,
        "serves": plan.settings.repository or str(plan.live),
        "release_id": None if plan.settings.repository else serves(plan.live),
        "pids": {"supervisor": stack.supervisor_pid, **_pids(status)},
        "state": str(plan.state),
        "changed": changed,
        "key_file": str(key_file) if key_file else None,
        "ready_s": round(took_s, 3),
    }


def _pids(status: Mapping[str, Any]) -> dict[str, int]:
    return {name: part["pid"] for name, part in status.get("parts", {}).items()}


def _release(plan: LocalPlan, release: Path) -> None:
    """Move the running server to a release without a failed request (docs/live_releases.md)."""
    say(f"moving to the release {release}")
    done = subprocess.run(
        [sys.executable, "-m", "serving", "release", str(release), "--name", plan.server_name, "--reason", "deploy up"],
        cwd=CHECKOUT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise DeployError(f"the release was refused: {done.stderr.strip().rpartition('error: ')[2]}")


def down(state: Path, timeout_s: float) -> dict[str, Any]:
    """Stop the stack of a state directory. Its certificate, keys, data and logs stay."""
    stack = None
    if state.is_dir():
        with holding(state):
            stack = read_stack(state)
            if stack:
                plan = LocalPlan(state, LocalSettings.from_json(stack.settings))
                clean = stop_stack(state, stack, timeout_s)
                remove_scratch(plan.gateway)
    if not stack:
        say("no stack is up")
        return {"stopped": False, "clean": True}
    say("stopped" if clean else f"these processes are left: {processes_of_stack(state, stack)}")
    return {"stopped": True, "clean": clean, "exit_code": 0 if clean else 1}


def _make_first_key(plan: LocalPlan) -> Path | None:
    """A first client and its key, in a file for its owner alone, where there never was one; that file, None if it is gone."""
    file = plan.keys.directory / f"{FIRST_CLIENT}.key"
    if (plan.keys.directory / "keys.json").exists():
        return file if file.exists() and FIRST_CLIENT in plan.keys.clients() else None
    secret = plan.keys.add(FIRST_CLIENT, Limits())
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(secret + "\n")
    say(f"the key of the first client is in {file}")
    return file


def _remove_but(state: Path, kept: set[str]) -> None:
    """Remove what a failed start has made in the state directory: keys that nobody was told of, data, files to run with."""
    for name in set(os.listdir(state)) - kept:
        path = state / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
