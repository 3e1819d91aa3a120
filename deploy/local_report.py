"""How the stack of a state directory is: asked of each part, and of Prometheus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.local_parts import Part, Plan, fetch, why_not_ready
from deploy.local_plan import LocalPlan
from deploy.local_settings import LocalSettings
from deploy.local_state import read_stack, read_status
from deploy.local_supervisor import PLAN, supervisor_log
from serving.embedded import triton_home
from serving.instances import run_directory


def report(state: Path) -> dict[str, Any]:
    """Which parts run, whether they are ready and where; the alerts and targets of Prometheus where it answers."""
    stack = read_stack(state)
    if not stack:
        return {"ready": False, "state": str(state), "parts": []}
    plan = LocalPlan(state, LocalSettings.from_json(stack.settings))
    status = read_status(state)
    try:
        parts = Plan.read(state / PLAN).parts
    except (OSError, ValueError):
        parts = ()
    rows = [_row(part, status) for part in parts]
    prometheus = next((part for part in parts if part.name == "prometheus"), None)
    told = {
        "ready": stack.lives and status.get("phase") == "settled" and all(row["ready"] for row in rows),
        "supervisor": {"pid": stack.supervisor_pid, "lives": stack.lives, "phase": status.get("phase")},
        "state": str(state),
        "url": plan.url,
        "ca": str(plan.certificate.ca),
        "server": stack.server_name,
        "parts": rows,
    }
    if prometheus:
        told["alerts"] = list(_alerts(prometheus))
        told["targets_down"] = list(_targets_down(prometheus))
    return told


def _row(part: Part, status: dict[str, Any]) -> dict[str, Any]:
    known = status.get("parts", {}).get(part.name, {})
    why = why_not_ready(part)
    row = {"name": part.name, "ready": not why, "address": part.address, "log": part.log}
    row |= {"pid": known.get("pid"), "restarts": known.get("restarts", 0), "since": known.get("since")}
    return {**row, "reason": why} if why else row


def _ask(prometheus: Part, path: str) -> dict[str, Any]:
    try:
        status, body = fetch(prometheus.address + path)
        return dict(json.loads(body)["data"]) if status == 200 else {}
    except (OSError, ValueError, KeyError):
        return {}


def _alerts(prometheus: Part) -> Iterator[dict[str, Any]]:
    for alert in _ask(prometheus, "/api/v1/alerts").get("alerts", []):
        summary = alert["annotations"].get("summary", "")
        yield {"name": alert["labels"]["alertname"], "state": alert["state"], "summary": summary}


def _targets_down(prometheus: Part) -> Iterator[dict[str, Any]]:
    for target in _ask(prometheus, "/api/v1/targets?state=active").get("activeTargets", []):
        if target["health"] == "down":
            yield {"job": target["labels"]["job"], "url": target["scrapeUrl"], "error": target["lastError"]}


def logs(state: Path) -> dict[str, Path]:
    """Name -> file of every log of the stack, also of one that is down."""
    found = {path.stem: path for path in sorted((state / "logs").glob("*.log"))}
    found["supervisor"] = supervisor_log(state)
    stack = read_stack(state)
    if stack:
        plan = LocalPlan(state, LocalSettings.from_json(stack.settings))
        found["access"] = plan.gateway / "access.log"
        found["tritonserver"] = run_directory(triton_home()) / f"{plan.server_name}.log"
        found["candidate-tritonserver"] = run_directory(triton_home()) / f"{plan.candidate_name}.log"
    return {name: path for name, path in found.items() if path.exists()}
