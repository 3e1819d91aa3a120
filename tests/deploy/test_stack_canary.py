"""A candidate beside what serves, on a whole stack: `python -m deploy canary` start to promote, under load and without a failed answer."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from clients import SlideClient
from deploy.local_state import read_status
from serving.benchmarks.tiny_release import tiles
from tests.deploy.local_stack import Machine, Up, needs_all_programs, new_machine, new_stack, wait_for

pytestmark = needs_all_programs

PAUSE_S = 0.02
"""Between two requests of a client: without it they would leave nothing of the machine to the candidate's start."""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with new_machine() as machine:
        yield machine


@pytest.fixture(scope="module")
def stack(machine: Machine) -> Up:
    return new_stack(machine)


def canary(stack: Up, *words: str | Path) -> dict[str, Any]:
    """`deploy canary`, which must not fail; its last line."""
    done = stack.machine.deploy("canary", *words)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def refused(stack: Up, *words: str | Path) -> str:
    """`deploy canary`, which must fail, with an error of ours."""
    done = stack.machine.deploy("canary", *words)
    assert done.returncode not in (0, -9), done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


def release_id(stack: Up, name: str) -> str:
    return str(json.loads((stack.releases[name] / "release.json").read_text())["release_id"])


@contextmanager
def under_load(stack: Up) -> Iterator[list[str]]:
    """Clients over both protocols that classify tiles until the block ends; what they met is told.

    They ask once again: at a reload nginx closes connections of HTTP/1.1 between two requests, as any server may.
    """
    stop, failed = threading.Event(), list[str]()
    versions: set[str] = set()

    def work(scheme: str) -> None:
        url = stack.said["url"].replace("https", scheme)
        with SlideClient(url, api_key=stack.key, ca=stack.said["ca"], retries=1) as client:
            while not stop.wait(PAUSE_S):
                try:
                    client.classify(tiles(64)[:2])
                    versions.add(client.card.version)
                except Exception as error:
                    failed.append(f"{scheme}: {error!r}")

    workers = [threading.Thread(target=work, args=(scheme,)) for scheme in ("https", "grpcs")]
    for worker in workers:
        worker.start()
    try:
        yield failed
    finally:
        stop.set()
        for worker in workers:
            worker.join(60)
    assert not any(worker.is_alive() for worker in workers)
    failed += [] if versions else ["nothing was answered"]


def test_what_cannot_be_a_candidate_is_told_and_changes_nothing(stack: Up) -> None:
    before = stack.pids()
    assert "there is no candidate" in refused(stack, "stop")
    assert "say what the candidate gets" in refused(stack, "start", stack.releases["b"])
    assert "is what serves" in refused(stack, "start", stack.releases["a"], "--share", "10%")
    assert "is no release" in refused(stack, "start", stack.machine.top, "--share", "10%")
    assert "is no share" in refused(stack, "start", stack.releases["b"], "--share", "many")
    assert "0.01 to 100" in refused(stack, "start", stack.releases["b"], "--share", "101%")
    assert stack.pids() == before
    assert not (stack.state / "candidate").exists()
    assert stack.classify().label


def test_a_candidate_answers_its_share_and_is_promoted_without_a_failed_request(stack: Up) -> None:
    slides = [stack.machine.top / f"p{number}_0.tif" for number in range(2, 10)]
    for slide in slides:
        slide.symlink_to(stack.slide)
    before = stack.pids()
    with under_load(stack) as failed:
        said = canary(stack, "start", stack.releases["b"], "--share", "50%")
        assert "shadow" not in stack.pids()
        assert said["candidate"]["release_id"] == release_id(stack, "b")
        assert said["candidate"]["number"] == said["serving"]["number"] + 1
        numbers = {said["serving"]["number"], said["candidate"]["number"]}
        assert {name: pid for name, pid in stack.pids().items() if name in before} == before
        assert "a candidate already" in refused(stack, "start", stack.releases["b"], "--share", "1%")

        with SlideClient(stack.said["url"], api_key=stack.key, ca=stack.said["ca"]) as client:
            found = [[int(client.predict(slide).model_version) for _ in range(2)] for slide in slides]
        assert all(one == again for one, again in found)  # a slide stays with the release that answered it
        assert {version for versions in found for version in versions} == numbers

        wait_for(lambda: canary(stack, "status")["tracks"].get("canary", {}).get("requests", 0) > 20)
        told = canary(stack, "share", "--share", "10%", "--shadow", "20%")
        assert told["candidate"]["canary_percent"] == 10
        assert told["candidate"]["shadow_percent"] == 20
        assert "shadow" in stack.pids()
        shadow = wait_for(lambda: canary(stack, "status")["shadow"].get("other_label"))
        assert shadow
        for result in ("same_label|other_label", "other_label"):
            query = f'clotline_shadow_requests_total{{server="clotline",result=~"{result}"}} > 0'
            wait_for(lambda query=query: stack.ask_prometheus(query), query)
        told = canary(stack, "promote")
    assert failed == []
    assert told["event"] == "promoted"
    assert {track: counts["errors"] for track, counts in told["tracks"].items()} == dict.fromkeys(
        told["tracks"], 0
    )
    assert told["tracks"]["canary"]["mean_ms"] > 0
    after = stack.classify()
    assert int(after.model_version) == said["candidate"]["number"]
    assert canary(stack, "status") == {
        "serving": {"number": said["candidate"]["number"], "release_id": release_id(stack, "b")},
        "candidate": None,
    }
    assert stack.pids() == before
    assert not (stack.state / "candidate").exists()
    differences = (stack.state / "logs" / "differences.jsonl").read_text().splitlines()
    assert {json.loads(line)["model"] for line in differences} == {"tile_classifier"}


def test_a_candidate_that_dies_fails_nobody_and_comes_back(stack: Up) -> None:
    canary(stack, "start", stack.releases["a"], "--share", "100%")

    def candidate() -> dict[str, Any]:
        return dict(read_status(stack.state)["parts"]["candidate"])

    def over_rest() -> set[str]:
        with SlideClient(stack.said["url"], api_key=stack.key, ca=stack.said["ca"], retries=0) as client:
            return {client.predict(stack.slide).model_version for _ in range(3)}

    assert "shadow" not in stack.pids()
    status = canary(stack, "status")
    serving, trying = str(status["serving"]["number"]), str(status["candidate"]["number"])
    assert over_rest() == {trying}
    os.kill(candidate()["pid"], signal.SIGKILL)
    assert over_rest() <= {serving, trying}
    wait_for(lambda: candidate()["restarts"] == 1 and candidate()["ready"])
    assert over_rest() == {trying}
    targets = stack.ask_prometheus('up{server="candidate"}')
    assert {row["metric"]["job"] for row in targets} <= {"triton", "supervisor"}


def test_no_other_release_gets_the_candidates_number(stack: Up) -> None:
    done = stack.machine.deploy("up", "--repository", stack.releases["b"] / "models")
    assert done.returncode == 2
    assert "a plain repository has no releases with numbers" in done.stderr
    before = canary(stack, "status")
    numbers = {before["serving"]["number"], before["candidate"]["number"]}
    said = stack.machine.up("--release", stack.another("c", bias=0.5))
    assert said["changed"] == ["release"]
    status = canary(stack, "status")
    assert status["serving"]["number"] not in numbers
    assert status["candidate"]["number"] == before["candidate"]["number"]


def test_a_candidate_is_stopped_and_what_served_goes_on(stack: Up) -> None:
    with under_load(stack) as failed:
        told = canary(stack, "stop")
    assert failed == []
    assert told["event"] == "stopped"
    status = canary(stack, "status")
    assert status["candidate"] is None
    assert stack.classify().model_version == str(status["serving"]["number"])
    assert not any("stack-" in words and "-candidate" in words for words in stack.machine.processes())


def test_a_candidate_that_is_asked_nothing_is_not_waited_for(stack: Up) -> None:
    canary(stack, "start", stack.releases["a"], "--share", "50%")
    assert canary(stack, "share", "--share", "0%")["candidate"]["canary_percent"] == 0
    done = stack.machine.deploy("canary", "stop")
    assert done.returncode == 0, done.stderr
    assert "not waited for" not in done.stderr  # as it says after 30 s in vain


def test_down_ends_a_candidate_too(stack: Up) -> None:
    canary(stack, "start", stack.releases["a"], "--share", "1%")
    told = stack.machine.deploy("canary", "status").stdout
    assert "answers 1 % of the requests, and 0 % are compared" in told
    logs = stack.machine.deploy("logs", "candidate-tritonserver", "--lines", "1")
    assert logs.returncode == 0, logs.stderr
    assert stack.machine.deploy("down").returncode == 0
    assert stack.machine.processes() == []
    assert {path.name for path in stack.state.iterdir()} == {"data", "keys", "lock", "logs", "tls"}
