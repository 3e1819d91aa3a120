"""Alerts fire and clear on what really happens: a server that is killed, requests that fail, requests that take seconds.

The rules are those of docker/prometheus, made quick (`quick`): what has to hold for minutes holds for a second, and windows
of minutes, hours and days are ten seconds. Thresholds are as they are.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from serving.benchmarks.tiny_release import make_release
from tests.deploy.gateway_stack import jpeg_tiles, needs_nginx
from tests.deploy.monitoring_stack import (
    DOCKER,
    Watched,
    every_second,
    needs_alertmanager,
    needs_prometheus,
    under_load,
    wait_for,
    watched,
)

pytestmark = [needs_nginx, needs_prometheus, needs_alertmanager]
CLIENTS = 4
PAUSE_S = 0.2
HELD_S = 3.0
"""How long tritonserver is held up: longer than LatencyHigh's 2.5 s, shorter than what its supervisor takes for its end."""
BUSY_MACHINE = {"CpuSaturated", "MemoryShort", "QueueTimeHigh", "LatencyHigh", "ModelLatencyHigh"}
TIMEOUT_S = 90


def quick(text: str) -> str:
    """A rule file whose alerts take seconds."""
    text = re.sub(r"^( +for): \w+", r"\1: 1s", every_second(text), flags=re.M)
    return re.sub(r"\[\d+[mhd]\]", "[10s]", text)


def test_quick_changes_durations_only() -> None:
    for file in (DOCKER / "prometheus" / "rules").glob("*.yml"):
        before, after = file.read_text(), quick(file.read_text())
        assert re.sub(r"\d+[smhd]", "", before) == re.sub(r"\d+[smhd]", "", after)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A tiny classifier that a few clients ask, a few times a second each."""
    directory = tmp_path_factory.mktemp("live")
    repository = make_release(directory / "release", bias=-1.0) / "models"
    serve = ["--repository", str(repository)]
    with (
        watched(directory, serve, rewrite=quick, alertmanager=True) as found,
        under_load(lambda stop, _: _load(found, stop), CLIENTS),
    ):
        yield found


def _load(found: Watched, stop: threading.Event) -> None:
    tile = jpeg_tiles()[0]
    while not stop.wait(PAUSE_S):
        try:
            found.stack.infer(found.stack.keys["lab"], tile)
        except OSError:
            continue  # while the gateway is busy starting


def wait_until_quiet(live: Watched, *alerts: str) -> None:
    """Until none of these fires."""
    wait_for(lambda: not live.firing() & set(alerts), TIMEOUT_S, live.firing)


def test_nothing_fires_while_all_is_well(live: Watched) -> None:
    """But for alerts that are true of a machine on which much else runs."""
    wait_for(lambda: bool(live.prometheus.now("clotline:gateway_error_ratio:5m == 0")), TIMEOUT_S)
    wait_for(lambda: not live.firing() - BUSY_MACHINE, TIMEOUT_S, live.firing)


def test_latency(live: Watched) -> None:
    def hold_up() -> bool:
        held = live.processes("tritonserver")
        try:
            for pid in held:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(HELD_S)
        finally:
            for pid in held:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        time.sleep(1)
        return "LatencyHigh" in live.firing()

    wait_until_quiet(live, "LatencyHigh")
    wait_for(hold_up, TIMEOUT_S, live.firing)
    wait_until_quiet(live, "LatencyHigh")
    wait_for(lambda: ("tickets", "resolved", "LatencyHigh") in live.notifications, TIMEOUT_S)


def test_server_not_ready_and_error_ratio(live: Watched) -> None:
    """tritonserver is killed as often as its supervisor starts it again, until the alerts fire."""
    expected = {"ServerDown", "ServerNotReady", "ErrorRatioHigh"}
    seen: set[str] = set()

    def kill() -> bool:
        for pid in live.processes("tritonserver"):
            os.kill(pid, signal.SIGKILL)
        seen.update(live.firing())
        return seen >= expected

    wait_until_quiet(live, *expected)
    wait_for(kill, TIMEOUT_S, lambda: seen)
    wait_until_quiet(live, *expected)
    told = ("pages", "resolved", "ServerDown")
    wait_for(lambda: told in live.notifications, TIMEOUT_S, lambda: live.notifications)
    assert ("pages", "firing", "ServerDown") in live.notifications
    assert live.stack.infer(live.stack.keys["lab"], jpeg_tiles()[0]).status == 200


def test_pages_and_tickets_reach_their_receivers(live: Watched) -> None:
    """What the tests before made Alertmanager say."""
    assert live.notifications
    rules = live.prometheus.get("rules")["groups"]
    severities = {
        rule["name"]: rule["labels"]["severity"]
        for group in rules
        for rule in group["rules"]
        if rule["type"] == "alerting"
    }
    for receiver, _, alert in live.notifications:
        assert receiver == f"{severities[alert]}s", alert
