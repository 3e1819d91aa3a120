"""What the benchmarks call passed, and how they treat what cannot be measured; the figures themselves need an idle machine."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from deploy.benchmarks import canary
from deploy.benchmarks.canary import Answered, Load
from deploy.benchmarks.guarded import Target
from deploy.benchmarks.load import Connection, Outcome, closed_loop, open_loop
from deploy.benchmarks.overload import judged, recovered
from deploy.errors import DeployError

OK = Outcome(0, 200, 0.0, 0.0, 0.05, b"")
REFUSED = Outcome(0, 503, 0.0, 0.0, 0.01, b"HTTP/1.1 503\r\nRetry-After: 1\r\n\r\n")
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def test_overload_passes_only_if_every_bar_is_met() -> None:
    calm, storm = 50 * [OK], [*50 * [OK], *50 * [REFUSED]]
    assert judged(calm, storm, 1.0)["exit_code"] == 0
    slow = dataclasses.replace(OK, latency_s=0.11)
    late = dataclasses.replace(REFUSED, latency_s=0.11)
    for changed in (
        judged(calm, [*50 * [slow], *50 * [REFUSED]], 1.0),
        judged(calm, [*storm, late], 1.0),
        judged(calm, storm, 0.9),
        judged(calm, 100 * [OK], 1.0),  # nothing was refused: it was no overload
        judged(calm, 100 * [REFUSED], 1.0),
        judged(calm, [*storm, dataclasses.replace(OK, status=500)], 1.0),
        judged(calm, [*storm, dataclasses.replace(REFUSED, answer=b"")], 1.0),
    ):
        assert (changed["passed"], changed["exit_code"]) == (False, 1)
    # A request that the load generator sent late is no slow refusal, but a slow answer it is.
    sent_late = dataclasses.replace(REFUSED, sent_s=0.2, latency_s=0.21)
    assert judged(calm, [*storm, sent_late], 1.0)["refusal_max_ms"] == 10


def test_recovery_is_measured_against_what_is_full_around_it() -> None:
    assert recovered([50, 60], [44]) == pytest.approx(0.8)
    assert recovered([50, 40, 30], [45, 35]) == pytest.approx(1.0), (
        "the machine became slower, not the server"
    )
    assert recovered([50, 50, 50, 50], [40, 40, 40]) == pytest.approx(0.8), "each server stays slow"
    assert recovered([50, 50, 50, 50], [50, 40, 45]) == pytest.approx(0.9)


def canary_load(**changed: Any) -> Load:
    """400 answers: 100 before, 200 at 10 %, 100 after; every release answers each tile with its own number."""
    at_ten = [Answered(10 + n / 100, 0.05, 0, 8 if n % 10 == 0 else 7, 0.0) for n in range(200)]
    answers = [Answered(n / 100, 0.05, 0, 7, 0.0) for n in range(100)] + at_ten
    answers += [Answered(20 + n / 100, 0.05, 0, 8, 0.0) for n in range(100)]
    answers = [dataclasses.replace(each, first=each.version / 10) for each in answers]
    load = Load(Target("127.0.0.1", 1, "localhost:1"), [b""], answers)
    return dataclasses.replace(load, **changed)


def test_canary_passes_only_if_every_bar_is_met() -> None:
    phases = {"before": (0.0, 1.0), "10%": (10.0, 12.0), "after": (20.0, 21.0)}
    expected = {7: [0.7], 8: [0.8]}

    def verdict(load: Load) -> bool:
        told = canary.judged(load, phases, expected, (7, 8))
        assert told["exit_code"] == (0 if told["passed"] else 1)
        return bool(told["passed"])

    good = canary_load()
    assert verdict(good)
    assert not verdict(canary_load(failures=["one"]))
    other = [dataclasses.replace(good.answers[0], first=0.8), *good.answers[1:]]
    assert not verdict(canary_load(answers=other)), "an answer that is that of the other release"
    unknown = [dataclasses.replace(good.answers[0], version=9), *good.answers[1:]]
    assert not verdict(canary_load(answers=unknown))
    early = [dataclasses.replace(good.answers[0], version=8, first=0.8), *good.answers[1:]]
    assert not verdict(canary_load(answers=early)), "the candidate answered before it was started"
    share = [
        dataclasses.replace(each, version=7, first=0.7) if 10 <= each.asked_s < 12 else each
        for each in good.answers
    ]
    assert not verdict(canary_load(answers=share)), "the candidate got nothing"
    assert not canary.judged(good, phases, {7: [0.7], 8: [0.7]}, (7, 8))["passed"], (
        "releases that answer alike"
    )


@pytest.fixture
def server() -> tuple[Target, list[int]]:
    """Answers two requests a connection, then closes it without a word; counts connections."""
    listener = socket.create_server(("127.0.0.1", 0))
    seen: list[int] = []

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            seen.append(1)
            for _ in range(2):
                if not connection.recv(1000):
                    break
                connection.sendall(ANSWER)
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    return Target("127.0.0.1", listener.getsockname()[1], ""), seen


def test_a_connection_that_was_closed_between_requests_is_made_anew(server: tuple[Target, list[int]]) -> None:
    target, seen = server
    connection = Connection(target)
    assert [connection.ask(b"x")[2] for _ in range(5)] == [False, False, True, False, True]
    assert len(seen) == 3


def test_an_open_loop_sends_at_its_rate_and_a_closed_one_tells_of_failures(
    server: tuple[Target, list[int]],
) -> None:
    target, _ = server
    outcomes = open_loop(target, [b"x"], rate_per_s=50, seconds=1.0, connections=1)
    assert 25 < len(outcomes) < 85
    assert {outcome.status for outcome in outcomes} == {200}
    closed = Target("127.0.0.1", 1, "")
    with pytest.raises(DeployError, match="failed: status 0"):
        closed_loop(closed, [b"x"], 1, 0.05, warm_up_s=0.0)


def test_a_missing_repository_is_told_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.benchmarks", "overload", "--repository", str(tmp_path / "none")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: --repository")
    assert done.stderr.count("\n") == 1
