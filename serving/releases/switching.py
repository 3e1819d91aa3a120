"""Release, rollback, and what is done after a command that was killed. All of it under the lock of the live directory.

Order of a release; until the switch, and whatever fails, the server goes on with what it serves:
  1 copy aside, checking every byte; rename into the repository   (files that the server has not been told of)
  2 load and warm up the models, whose names no model in use has  (memory, and some of the processors' time)
  3 hold the answers of `<public>__rN` against the golden examples
  4 note the switch in live.json, point the public models, load `clotline_release`: one request moves all of them
  5 ask the public models again; note what serves
  6 wait until the public models of the release before have given their last answers; it stays loaded for a rollback
  7 unload and delete the release before that one
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from serving.releases import configs
from serving.releases.bundle import Bundle
from serving.releases.counting import backends_to_come
from serving.releases.errors import NothingToRollBackTo, ReleaseError, ServerRefused
from serving.releases.golden import Golden
from serving.releases.live import Live, Resident, State, now_utc, remove
from serving.releases.server import Server
from serving.releases.staging import collect, entries, point_public_models, stage
from serving.tritonserver import TritonServer

FEW_EXAMPLES = 2

Announce = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """Who asks for a release, why, and how patient they are.

    Attributes:
        by: user@host.
        reason: for the journal.
        drain_s: how long to wait for the last answers of the release before.
        announce: told of every step.
        tritonserver: that is to be started on the live directory, where none runs; None: the one that is found.
    """

    by: str
    reason: str = ""
    drain_s: float = 30.0
    announce: Announce = lambda text: None
    tritonserver: TritonServer | None = None


def release(live: Live, server: Server | None, bundle: Bundle, order: Order) -> dict[str, Any]:
    """Move a server to a release; without a server, a live directory that none runs on.

    Returns what happened: "number", "release_id", "changed", seconds of the steps. Raises ReleaseError; the server then serves
    what it did before, and nothing of the release is left.
    """
    started = time.monotonic()
    state = recover(live, server, order)
    for known, word in ((state.serving, "serving"), (state.previous, "resident")):
        if known and known.release_id == bundle.release_id:
            bundle.verify()
            if word == "serving":
                return {**_told(known), "changed": False, "was": known.release_id}
            return {**_move(live, server, state, known, order, started), "changed": True}
    number = state.number_for(bundle.release_id)
    live.write(state.without_number(number))  # one that failed is not used again
    state = live.read()
    target = Resident(
        number=number,
        release_id=bundle.release_id,
        kind=str(bundle.manifest["kind"]),
        public=bundle.public,
        source=str(bundle.directory),
        since_utc="",
        by="",
        origin=dict(bundle.manifest.get("mlflow") or {}),
    )
    try:
        told = _bring_in(live, server, bundle, target, order)
    except BaseException as error:
        live.journal("refused", order.by, number=number, release_id=bundle.release_id, error=_one_line(error))
        _clean_up(live, server, order)
        raise
    return {**_move(live, server, state, target, order, started), **told, "changed": True}


def rollback(live: Live, server: Server | None, order: Order) -> dict[str, Any]:
    """Move a server back to the release before, which is loaded; a second rollback comes forward again.

    Raises NothingToRollBackTo, or ReleaseError, after which the server serves what it did before.
    """
    started = time.monotonic()
    state = recover(live, server, order)
    if state.previous is None:
        raise NothingToRollBackTo(f"{live.directory}: no release before the one that serves is there.")
    return {**_move(live, server, state, state.previous, order, started), "changed": True}


def recover(live: Live, server: Server | None, order: Order) -> State:
    """Complete, or undo, what a killed command began; returns the state, with no switch under way.

    What the server says decides; without a server the switch is completed, because whoever began it had checked the release.
    """
    state = live.read()
    if state.switching:
        target = state.switching
        done = server is None or target.number in server.ready_versions(configs.SWITCH_MODEL)
        state = state.switched() if done else replace(state, switching=None)
        if state.serving:
            _point(live, state.serving)
        live.write(state)
        live.journal("recovered", order.by, number=target.number, switched=done)
    if server and state.serving and state.serving.number not in server.ready_versions(configs.SWITCH_MODEL):
        _point(live, state.serving)
        with contextlib.suppress(
            ServerRefused
        ):  # what serves may be broken, which is when a rollback is wanted
            server.load(configs.SWITCH_MODEL)
    _tidy(live, state, server, order)
    return state


def _tidy(live: Live, state: State, server: Server | None, order: Order) -> list[str]:
    """Unload and delete what no release needs; what does not go now goes with the next command, and fails nothing."""
    try:
        gone = collect(live, state, server)
    except ReleaseError as error:
        live.journal("left", order.by, error=_one_line(error))
        return []
    if gone:
        live.journal("dropped", order.by, models=gone)
    return gone


def _bring_in(
    live: Live, server: Server | None, bundle: Bundle, target: Resident, order: Order
) -> dict[str, Any]:
    """Stage, load and check a release that nobody is led to yet."""
    clock = time.monotonic()
    order.announce("copying and checking the files")
    counting = server.counting_backends if server else backends_to_come(order.tritonserver)
    models = stage(live, bundle, target.number, counting)
    told: dict[str, Any] = {"stage_s": round(time.monotonic() - clock, 3), "checked": server is not None}
    live.journal("staged", order.by, number=target.number, release_id=target.release_id, source=target.source)
    if server is None:
        return told
    clock = time.monotonic()
    for model in models:
        order.announce(f"loading {model}")
        server.load(model)
    told["load_s"] = round(time.monotonic() - clock, 3)
    clock = time.monotonic()
    golden = Golden.of(live.release(target.number))
    differences = {}
    for public, config in entries(live, target.number, target.public).items():
        order.announce(f"comparing the answers of {config.name}")
        differences[public] = round(golden.check(server, config.name, public, config.max_batch_size), 7)
    told |= {"check_s": round(time.monotonic() - clock, 3), "largest_difference": differences}
    live.journal("checked", order.by, number=target.number, differences=differences)
    return told


def _move(
    live: Live, server: Server | None, state: State, target: Resident, order: Order, started: float
) -> dict[str, Any]:
    """Lead the public models to a release that is in the repository (and loaded, where there is a server)."""
    old = state.serving
    if server:
        _ask(live, server, target, staged=True)  # a model that was resident may have died meanwhile
    target = replace(target, since_utc=now_utc(), by=order.by)
    order.announce(f"switching to release {target.number}")
    clock = time.monotonic()
    live.write(replace(state, switching=target))
    try:
        _point(live, target)
        if server:
            server.load(configs.SWITCH_MODEL)
            switch_s = time.monotonic() - clock
            _ask(live, server, target, staged=False)
        else:
            switch_s = time.monotonic() - clock
    except BaseException as error:
        live.journal(
            "refused", order.by, number=target.number, release_id=target.release_id, error=_one_line(error)
        )
        _go_back(live, server, state, order)
        raise
    state = live.read().switched()
    live.write(state)
    live.journal("serving", order.by, number=target.number, release_id=target.release_id, reason=order.reason,
                 before=old.number if old else None, switch_s=round(switch_s, 4))  # fmt: skip
    drain_s: float | None = 0.0
    if server and old:
        order.announce(f"waiting for the last answers of release {old.number}")
        for public in set(old.public) - set(target.public):
            server.unload(public)
            remove(live.models / public)  # what lies in the repository and is not loaded looks like a fault
        drain_s = server.wait_unloaded(dict.fromkeys(old.public, old.number), order.drain_s)
    gone = _tidy(live, state, server, order)
    return {
        **_told(target),
        "was": old.release_id if old else None,
        "switch_s": round(switch_s, 4),
        "drain_s": drain_s if drain_s is None else round(drain_s, 3),
        "dropped": gone,
        "memory_mb": server.memory_mb() if server else None,
        "total_s": round(time.monotonic() - started, 3),
    }


def _point(live: Live, target: Resident) -> None:
    try:
        point_public_models(live, target.number, target.release_id, target.public)
    except OSError as error:
        raise ReleaseError(f"{live.models} cannot be written: {error.strerror}.") from error


def _ask(live: Live, server: Server, target: Resident, *, staged: bool) -> None:
    """A few golden examples through `<public>__rN` if `staged`, else through the public models, as this release."""
    golden = Golden.of(live.release(target.number))
    for public, config in entries(live, target.number, target.public).items():
        model, number = (config.name, 1) if staged else (public, target.number)
        ready = server.ready_versions(model)
        if ready != {number}:
            raise ServerRefused(
                f"server {server.name} has versions {sorted(ready)} of {model} ready, not {number}."
            )
        golden.check(server, model, public, config.max_batch_size, most=FEW_EXAMPLES, number=number)


def _go_back(live: Live, server: Server | None, state: State, order: Order) -> None:
    """Lead the public models to where they were before, and drop the release that was not good enough."""
    live.write(replace(state, switching=None))
    if state.serving:
        _point(live, state.serving)
        if server and server.reachable():
            server.load(configs.SWITCH_MODEL)
    _clean_up(live, server, order)


def _clean_up(live: Live, server: Server | None, order: Order) -> None:
    """After a failure: remove what it left, as well as that goes; the error that led here is what is told."""
    with contextlib.suppress(ReleaseError):
        recover(live, server if server and server.reachable() else None, order)


def _told(entry: Resident) -> dict[str, Any]:
    return {"number": entry.number, "release_id": entry.release_id, "public": entry.public}


def _one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:500]
