"""What the benchmarks call passed, and how they treat what cannot be measured; the figures themselves need an idle machine."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deploy.benchmarks.guarded import Target
from deploy.benchmarks.load import Connection, Outcome, closed_loop, open_loop
from deploy.benchmarks.overload import judged
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
