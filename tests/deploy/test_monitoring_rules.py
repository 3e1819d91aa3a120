"""Prometheus' and Alertmanager's files: valid, every alert tested by promtool both ways, told in docs and told where to."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "docker" / "prometheus"
ALERTMANAGER = ROOT / "docker" / "alertmanager" / "alertmanager.yml"
RULE_FILES = sorted((PROMETHEUS / "rules").glob("*.yml"))
TEST_FILES = sorted((PROMETHEUS / "tests").glob("*_test.yml"))

needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
needs_amtool = pytest.mark.skipif(not shutil.which("amtool"), reason="amtool is not installed")


def run(*command: str | Path, directory: Path = PROMETHEUS) -> subprocess.CompletedProcess[str]:
    """A program's output and exit code."""
    return subprocess.run(
        list(map(str, command)), cwd=directory, capture_output=True, text=True, timeout=120, check=False
    )


def alerts() -> list[dict[str, Any]]:
    """All alerts of all rule files."""
    groups = [group for file in RULE_FILES for group in yaml.safe_load(file.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def expectations() -> dict[str, list[tuple[int, bool]]]:
    """Alert -> of each promtool test: minute of an expectation, and whether it fires then; a new test begins with -1."""
    found: dict[str, list[tuple[int, bool]]] = {}
    for file in TEST_FILES:
        for test in yaml.safe_load(file.read_text())["tests"]:
            begun = set()
            for expected in test.get("alert_rule_test", []):
                of_alert = found.setdefault(expected["alertname"], [])
                if expected["alertname"] not in begun:
                    of_alert.append((-1, False))
                    begun.add(expected["alertname"])
                of_alert.append((_minutes(expected["eval_time"]), bool(expected.get("exp_alerts"))))
    return found


def _minutes(duration: str) -> int:
    units = {"d": 1440, "h": 60, "m": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([dhm])", duration))


@needs_promtool
def test_configuration_and_rules_are_valid() -> None:
    config = run("promtool", "check", "config", "prometheus.yml")
    assert config.returncode == 0, config.stdout + config.stderr
    checked = run("promtool", "check", "rules", "--lint-fatal", *RULE_FILES)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_promtool
@pytest.mark.parametrize("file", TEST_FILES, ids=lambda file: file.stem)
def test_alerts_fire_and_clear(file: Path) -> None:
    done = run("promtool", "test", "rules", file.name, directory=file.parent)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_has_a_test_that_fires_and_one_that_clears(alert: dict[str, Any]) -> None:
    seen = expectations().get(alert["alert"], [])
    fires = [place for place, (_, firing) in enumerate(seen) if firing]
    assert fires, "no promtool test sees it fire"
    cleared = [
        place
        for place in fires
        for later, (minute, firing) in enumerate(seen[place + 1 :], place + 1)
        if not firing and minute > seen[place][0] and all(at != -1 for at, _ in seen[place : later + 1])
    ]
    assert cleared, "no promtool test sees it clear after it has fired"


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_says_what_is_wrong_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"page", "ticket"}
    annotations = alert["annotations"]
    assert set(annotations) == {"summary", "description", "runbook"}
    assert "$value" in annotations["description"]
    assert annotations["runbook"] == f"docs/operations.md#{alert['alert'].lower()}"


def test_alert_names_are_unique_and_documented() -> None:
    names = [alert["alert"] for alert in alerts()]
    assert len(set(names)) == len(names)
    pages = [ROOT / "docs" / name for name in ("monitoring.md", "drift.md")]
    words = {word for page in pages if page.exists() for word in re.findall(r"\w+", page.read_text())}
    assert not set(names) - words, "alerts that neither docs/monitoring.md nor docs/drift.md tells of"


@needs_amtool
def test_alertmanager_routes_by_severity() -> None:
    checked = run("amtool", "check-config", ALERTMANAGER)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for labels, receiver in (
        (("alertname=ServerDown", "severity=page"), "pages"),
        (("alertname=NoTraffic", "severity=ticket"), "tickets"),
        (("alertname=ServerDown", "severity=page", "server=candidate"), "tickets"),
        (("alertname=NotificationsFail", "severity=ticket", "notify=no"), "nobody"),
    ):
        routed = run("amtool", "config", "routes", "test", f"--config.file={ALERTMANAGER}", *labels)
        assert routed.stdout.split() == [receiver], (labels, routed.stdout, routed.stderr)


def test_inhibition_names_alerts_that_exist() -> None:
    names = [alert["alert"] for alert in alerts()]
    config = yaml.safe_load(ALERTMANAGER.read_text())
    matchers = [
        matcher
        for rule in config["inhibit_rules"]
        for matcher in [*rule["source_matchers"], *rule["target_matchers"]]
    ]
    patterns = [
        word for matcher in matchers for word in re.split(r"[!=~]+", matcher)[1].strip('"').split("|")
    ]
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in names), pattern
