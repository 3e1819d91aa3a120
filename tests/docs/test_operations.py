"""The handbook has a heading for each alert, and no other; `runbook` leads to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.markdown_pages import ROOT, Page

RULES = sorted((ROOT / "docker" / "prometheus" / "rules").glob("*.yml"))
HANDBOOK = ROOT / "docs" / "operations.md"


def alerts() -> dict[str, dict[str, Any]]:
    return {
        rule["alert"]: rule
        for path in RULES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }


def headings_of_alerts() -> list[str]:
    """Those below "Alerts"."""
    text = HANDBOOK.read_text().partition("\n## Alerts\n")[2].partition("\n## ")[0]
    return [line.removeprefix("### ") for line in text.splitlines() if line.startswith("### ")]


def test_there_are_alerts() -> None:
    assert len(alerts()) > 25


@pytest.mark.parametrize("name", sorted(alerts()))
def test_an_alert_has_its_heading_and_its_runbook(name: str) -> None:
    assert headings_of_alerts().count(name) == 1
    path, _, anchor = alerts()[name]["annotations"]["runbook"].partition("#")
    assert Path(ROOT / path) == HANDBOOK
    assert anchor in Page(HANDBOOK).anchors
    assert anchor == name.lower()


def test_the_handbook_tells_of_no_alert_that_is_not_there() -> None:
    assert set(headings_of_alerts()) == set(alerts())
