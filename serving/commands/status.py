"""python -m serving status

Lists the servers of this checkout.
"""

from __future__ import annotations

import argparse
from typing import Any

from serving.embedded import triton_home
from serving.health import ask_ready
from serving.instances import InstanceState, instances
from serving.releases.live import describe, live_directory_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no options."""


def readiness(state: InstanceState) -> dict[str, Any]:
    """What the instance's supervisor answers to GET /ready; {} if it does not answer within 2 s."""
    try:
        return ask_ready(state.health)[1]
    except (OSError, ValueError):
        return {}


def run(_options: argparse.Namespace) -> dict[str, Any]:
    """List them."""
    rows = []
    for state in instances(triton_home()):
        told = readiness(state)
        status = "not ready" if state.status == "ready" and not told.get("ready") else state.status
        row = {"name": state.name, "status": status, "http": state.http, "grpc": state.grpc,
               "metrics": state.metrics, "health": state.health, "pid": state.launcher_pid,
               "repository": state.repository, "restarts": told.get("restarts", {})}  # fmt: skip
        if status != "ready":
            row["reason"] = told.get("reason", "the supervisor does not answer")
        live = live_directory_of(state.repository)
        if live:
            row["release"] = describe(live)
        rows.append(row)
        print(f"{state.name:16}{status:10} http {state.http}  grpc {state.grpc}  {state.repository}")
    if not rows:
        print("no server is up")
    return {"servers": rows}
