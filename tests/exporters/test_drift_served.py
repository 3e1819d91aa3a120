"""Drift for real: a release on a real tritonserver, a real Prometheus with the real rules, the same tiles and other ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "exporters.benchmarks", "drift")


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_alerts_are_quiet_on_the_same_and_fire_on_other_stain_and_blur() -> None:
    smallest = ("--patients", "36", "--window-s", "8", "--tiles-a-second", "30", "--epochs", "1")
    done = subprocess.run(
        [*COMMAND, *smallest], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.stdout, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["same"]["firing"] == []
    assert {"class", "brightness", "saturation", "red_density_share", "sharpness"} <= set(told["same"]["psi"])
    for kind, statistic, other in (
        ("stain", "red_density_share", "sharpness"),
        ("blur", "sharpness", "red_density_share"),
    ):
        assert statistic in told[kind]["firing"]
        assert other not in told[kind]["firing"]
        assert told[kind]["psi"][statistic] > told[kind]["fires_above"][statistic]
        assert told["same"]["psi"][statistic] < 0.5 * told["same"]["fires_above"][statistic]
    assert told["passed"]
    assert done.returncode == 0


@pytest.mark.parametrize("wrong", [("--patients", "3"), ("--tiles-a-second", "nan")])
def test_what_cannot_be_measured_is_said_in_a_line(wrong: tuple[str, str]) -> None:
    done = subprocess.run(
        [*COMMAND, *wrong], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
