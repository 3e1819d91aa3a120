"""Which release a registry names, and which servers serve it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serving.embedded import triton_home
from serving.errors import InstanceError, ServingError
from serving.instances import InstanceState, instances
from serving.releases.asking import opened
from serving.releases.bundle import read_bundle
from serving.releases.errors import BadRelease, LiveBusy, SourceUnavailable
from serving.releases.live import JOURNAL, Live, live_directory_of
from serving.releases.switching import release

FETCH_TIMEOUT_S = 3600.0
BROUGHT, REFUSED = "brought", "refused"


def fetch(uri: str, folder: Path, tracking_uri: str | None) -> dict[str, Any]:
    """Have `python -m exporters fetch-release` put what a registry names below `folder`, if it is not there.

    Returns its JSON line: "release" (directory), "release_id", "model_name", "model_version", "alias", "changed".

    Raises:
        SourceUnavailable: the registry cannot be asked, or names no release. What serves goes on serving.
        BadRelease: the command does not take the URI.
    """
    command = [sys.executable, "-m", "exporters", "fetch-release", uri, "--releases", str(folder)]
    command += ["--tracking-uri", tracking_uri] if tracking_uri else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=FETCH_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SourceUnavailable(f"the registry could not be asked for {uri}: {error}") from error
    said = done.stderr.strip().rpartition("error: ")[2].strip()
    if done.returncode == 2:
        raise BadRelease(said or f"{uri} was not understood.")
    try:
        told = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else None
    except (ValueError, IndexError):
        told = None
    if not isinstance(told, dict) or not {"release", "release_id"} <= set(told):
        raise SourceUnavailable(said or f"the registry could not be asked for {uri}.")
    return told


class Follower:
    """Moves servers to what a registry names, and tells which of them drift.

    Args:
        uri: for the journals.
        names: of servers; None: all that run on live directories when it looks.
        timeout_s: for one model to load, or to answer.
        drain_s: wait this long for the last answers of the release before.
    """

    def __init__(self, uri: str, names: Sequence[str] | None, timeout_s: float, drain_s: float) -> None:
        self.uri = uri
        self.names = names
        self.timeout_s = timeout_s
        self.drain_s = drain_s
        self._wanted: Mapping[str, Any] = {}

    def look(self, fetched: Mapping[str, Any], *, move: bool) -> dict[str, Any]:
        """Compare all servers with a release that `fetch` fetched, and move them if `move`; returns the report."""
        self._wanted = fetched
        return self._report([self._attend(name, state, move) for name, state in self._servers().items()])

    def standing(self) -> dict[str, Any]:
        """The report without a look at the registry."""
        return self._report([self._attend(name, state, False) for name, state in self._servers().items()])

    def _servers(self) -> dict[str, InstanceState | None]:
        living = {state.name: state for state in instances(triton_home())}
        if self.names:
            return {name: living.get(name) for name in self.names}
        found = {name: state for name, state in living.items() if live_directory_of(state.repository)}
        if not found:
            raise InstanceError(
                "no server runs on a live directory; start one: python -m serving up --live DIR --release RELEASE"
            )
        return dict(found)

    def _attend(self, name: str, state: InstanceState | None, move: bool) -> dict[str, Any]:
        directory = live_directory_of(state.repository) if state else None
        if state is None or directory is None:
            return {"name": name, "state": "down" if state is None else "not live", "serving": None}
        live = Live(directory)
        row: dict[str, Any] = {"name": name, "state": "in step", "serving": _serving(live)}
        wanted = self._wanted.get("release_id")
        if wanted is None:
            return row
        before = _followed(live, self.uri)
        by = f"follow {self.uri}"
        known = before.get("release_id") == wanted
        if row["serving"] == wanted:
            if move and not (known and before["outcome"] == BROUGHT):
                live.journal("followed", by, uri=self.uri, release_id=wanted, outcome=BROUGHT)
            return row
        if known:
            return {
                **row,
                "state": "rolled back" if before["outcome"] == BROUGHT else "refused",
                **_only(before, "error"),
            }
        if not move:
            return {**row, "state": "behind"}
        try:
            bundle = read_bundle(Path(self._wanted["release"]))
            reason = f"{self.uri} is version {self._wanted.get('model_version')}"
            with opened(live, state, by, reason, self.timeout_s, self.drain_s) as (server, order):
                release(live, server, bundle, order)
            live.journal("followed", by, uri=self.uri, release_id=wanted, outcome=BROUGHT)
            return {**row, "state": "moved", "serving": _serving(live)}
        except LiveBusy as error:
            return {**row, "state": "busy", "error": str(error)}
        except ServingError as error:
            if not _reachable(state):
                return {**row, "state": "unreachable", "error": str(error)}
            live.journal("followed", by, uri=self.uri, release_id=wanted, outcome=REFUSED, error=str(error))
            return {**row, "state": "refused", "error": str(error)}

    def _report(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        wanted = {key: self._wanted.get(key) for key in ("release_id", "model_name", "model_version")}
        drifting = [row["name"] for row in rows if row["state"] not in ("in step", "moved")]
        return {"uri": self.uri, **wanted, "drifting": drifting, "servers": rows}


def _serving(live: Live) -> str | None:
    serving = live.read().serving
    return serving.release_id if serving else None


def _reachable(state: InstanceState) -> bool:
    from serving.releases.server import Server

    with Server(state, timeout_s=10.0) as server:
        return server.reachable()


def _followed(live: Live, uri: str) -> dict[str, Any]:
    """What the journal says of the last release that this URI named: outcome `brought` (if it does not serve now, somebody
    rolled it back) or `refused`."""
    try:
        lines = (live.directory / JOURNAL).read_text().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("event") == "followed" and entry.get("uri") == uri:
            return dict(entry)
    return {}


def _only(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: values[key] for key in keys if key in values}
