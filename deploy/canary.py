"""A candidate beside the release that serves: a second tritonserver, to which the gateway sends a share of the requests (canary), or
whose answers are compared with those of the first (shadow).

The candidate has the number that its release will have on the first server, where no other release gets it. So
`model_version` says which release answered, on both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from deploy.errors import DeployError, UsageError
from deploy.live_directory import serves
from deploy.local import Order, up
from deploy.local_parts import fetch, write_json
from deploy.local_plan import LocalPlan
from deploy.local_settings import LOOPBACK, LocalSettings
from deploy.local_state import BEGUN, read_stack
from serving.releases.bundle import read_bundle
from serving.releases.live import describe

REQUESTS = "clotline_gateway_requests_total"
DURATION = "clotline_gateway_request_duration_seconds"
SHADOW_REQUESTS = "clotline_shadow_requests_total"
SHADOW_DROPPED = "clotline_shadow_dropped_total"
SERVER_ERROR = 500


def start(state: Path, release: Path, canary_percent: float, shadow_percent: float) -> dict[str, Any]:
    """Start a second tritonserver on a release, then let the gateway ask it.

    Raises UsageError, DeployError, or ServingError of the release; the stack is then as it was.
    """
    plan = _running(state)
    if plan.settings.candidate:
        raise UsageError(
            f"{plan.settings.candidate} is a candidate already: promote it or stop it first, or change its share."
        )
    if not canary_percent and not shadow_percent:
        raise UsageError(
            "say what the candidate gets: --share 10% of the requests, or --shadow 10%, or both."
        )
    if read_bundle(release).release_id == serves(plan.live):
        raise UsageError(f"{release} is what serves; a candidate is another release.")
    up(_order(state, candidate=str(release), canary_percent=canary_percent, shadow_percent=shadow_percent))
    begun = {"utc": datetime.now(timezone.utc).isoformat(timespec="seconds"), "counted": _counted(plan)}
    write_json(state / BEGUN, begun)
    return report(state)


def share(state: Path, canary_percent: float | None, shadow_percent: float | None) -> dict[str, Any]:
    """Change a candidate's shares; None: as it was."""
    _with_candidate(state)
    up(_order(state, canary_percent=canary_percent, shadow_percent=shadow_percent))
    return report(state)


def promote(state: Path) -> dict[str, Any]:
    """Move the first server to the candidate's release, without a failed request, then end the second server."""
    plan = _with_candidate(state)
    up(_order(state, release=plan.settings.candidate))
    return {"event": "promoted", **_end(state)}


def stop(state: Path) -> dict[str, Any]:
    """End the candidate: the gateway asks it no more, its last answers are waited for, its server ends."""
    _with_candidate(state)
    return {"event": "stopped", **_end(state)}


def report(state: Path) -> dict[str, Any]:
    """What the candidate is, what each track answered since it began, and how its answers differ from those of the first."""
    plan = _running(state)
    settings = plan.settings
    serving = describe(plan.live)["serving"] if not settings.repository else None
    told: dict[str, Any] = {"serving": _named(serving), "candidate": None}
    if not settings.candidate:
        return told
    told["candidate"] = {
        **(_named(describe(plan.candidate_live)["serving"]) or {}),
        "release": settings.candidate,
        "canary_percent": settings.canary_percent,
        "shadow_percent": settings.shadow_percent,
    }
    try:
        begun = json.loads((state / BEGUN).read_text())
    except (OSError, ValueError):
        begun = {"utc": None, "counted": {}}
    told["since_utc"] = begun["utc"]
    told["tracks"] = _tracks(_since(_counted(plan), begun["counted"]))
    if settings.shadow_percent:
        told["shadow"] = _compared(plan)
    return told


def _order(state: Path, **settings: Any) -> Order:
    return Order(state, settings, {})


def _running(state: Path) -> LocalPlan:
    stack = read_stack(state) if state.is_dir() else None
    if not stack or not stack.lives:
        raise UsageError("no stack is up; `python -m deploy up --release RELEASE` starts one.")
    return LocalPlan(state, LocalSettings.from_json(stack.settings))


def _with_candidate(state: Path) -> LocalPlan:
    plan = _running(state)
    if not plan.settings.candidate:
        raise UsageError(
            "there is no candidate; `python -m deploy canary start RELEASE --share 10%` brings one in."
        )
    return plan


def _end(state: Path) -> dict[str, Any]:
    told = report(state)
    up(_order(state, candidate="", canary_percent=0.0, shadow_percent=0.0))
    (state / BEGUN).unlink(missing_ok=True)
    return told


def _named(resident: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if resident is None else {"number": resident["number"], "release_id": resident["release_id"]}


def _samples(port: int) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of each sample that a part of the stack tells Prometheus."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        status, body = fetch(f"http://{LOOPBACK}:{port}/metrics")
    except OSError as error:
        raise DeployError(f"port {port} does not tell its metrics: {error}.") from error
    if status == 200:
        for family in text_string_to_metric_families(body.decode()):
            for sample in family.samples:
                yield sample.name, dict(sample.labels), sample.value


def _counted(plan: LocalPlan) -> dict[str, float]:
    """`TRACK requests`, `errors`, `seconds` and `timed` of all inference requests that were logged so far."""
    found: dict[str, float] = {}
    for name, labels, value in _samples(plan.ports.gateway_metrics):
        if labels.get("route") != "infer":
            continue
        if name == REQUESTS:
            what = ["requests", "errors"] if int(labels["status"]) >= SERVER_ERROR else ["requests"]
        elif name in (f"{DURATION}_sum", f"{DURATION}_count"):
            what = ["seconds" if name.endswith("_sum") else "timed"]
        else:
            continue
        for each in what:
            key = f"{labels['track']} {each}"
            found[key] = found.get(key, 0.0) + value
    return found


def _since(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """What came since; where counting began anew meanwhile, what came since then."""
    began_anew = any(value < before.get(key, 0.0) for key, value in now.items())
    return {key: value - (0.0 if began_anew else before.get(key, 0.0)) for key, value in now.items()}


def _tracks(counted: Mapping[str, float]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for track in sorted({key.split()[0] for key in counted}):
        timed = counted.get(f"{track} timed", 0.0)
        told[track] = {
            "requests": int(counted.get(f"{track} requests", 0.0)),
            "errors": int(counted.get(f"{track} errors", 0.0)),
            "mean_ms": round(1000 * counted.get(f"{track} seconds", 0.0) / timed, 2) if timed else None,
        }
    return told


def _compared(plan: LocalPlan) -> dict[str, Any]:
    told: dict[str, Any] = {"dropped": 0}
    for name, labels, value in _samples(plan.ports.shadow):
        if name == SHADOW_REQUESTS:
            told[labels["result"]] = told.get(labels["result"], 0) + int(value)
        elif name == SHADOW_DROPPED:
            told["dropped"] = int(value)
    return told
