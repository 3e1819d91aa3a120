"""A server that is killed in parts: it says so, mends itself, and never answers wrongly. Bars: `serving.benchmarks kills`."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving import supervisor
from serving.benchmarks.kills import victims
from serving.errors import StartError
from serving.guarded_server import Plan
from serving.health import Health
from serving.instances import InstanceState
from serving.processes import processes_of, shared_memory_of
from serving.stubs import stubs_of
from serving.supervisor import Supervisor
from tests.serving.conftest import launching, wait_until
from tests.serving.public_model import ask, expected, health, make_public
from tests.serving.test_launcher import serving, state_of

TILES = [b"x" * length for length in range(5, 30)]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_public(tmp_path_factory.mktemp("public") / "models")


@pytest.fixture(scope="module")
def up(repository: Path) -> Iterator[dict[str, Any]]:
    """A server that the tests of this module may kill in parts: each leaves it ready."""
    with launching() as start:
        yield start(repository, "--name", f"mended-{os.getpid()}").ready()


class Clients:
    """Clients that ask without a pause for as long as the block lasts."""

    def __init__(self, url: str, count: int = 4) -> None:
        self.url, self.right, self.failed, self.wrong = url, 0, 0, []
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(number,)) for number in range(count)]

    def run(self, number: int) -> None:
        while not self.stopping.is_set():
            number = (number + 1) % len(TILES)
            try:
                got = ask(self.url, TILES[number])
            except (OSError, ValueError, http.client.HTTPException):
                self.failed += 1
                self.stopping.wait(0.05)
                continue
            if got == expected(TILES[number]):
                self.right += 1
            else:
                self.wrong.append(got)

    def __enter__(self) -> Clients:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join()


@pytest.mark.parametrize(
    ("kind", "_when"),
    [
        ("steady", "first"),
        ("steady", "while a stub of the load before still lives"),
        ("tritonserver", ""),
        ("guardian", ""),
    ],
)
def test_kill_9_of_a_child_is_told_and_mended(up: dict[str, Any], kind: str, _when: str) -> None:
    assert health(up["health"])[0] == 200
    before = health(up["health"])[1]["restarts"]
    with Clients(up["http"]) as clients:
        wait_until(lambda: clients.right > 20, 20)
        os.kill(victims(up["name"])[kind], signal.SIGKILL)
        wait_until(lambda: health(up["health"])[0] == 503, 10)
        body = health(up["health"])[1]
        if not body["ready"]:
            assert body["reason"]
            assert body["since"].endswith("Z")
        assert health(up["health"], "/live")[0] == 200
        wait_until(lambda: health(up["health"])[0] == 200, 60)
        right = clients.right
        wait_until(lambda: clients.right > right + 20, 20)
    assert clients.wrong == []
    after = health(up["health"])[1]["restarts"]
    if kind == "steady":
        assert after["models"]["steady"] == before["models"].get("steady", 0) + 1
        assert after["server"] == before["server"]
    else:
        assert after["server"] == before["server"] + 1
        state = state_of(up["name"])
        wait_until(lambda: len(processes_of(state.instance_id)) == 4, 20)  # guardian, tritonserver, two stubs
        stubs = stubs_of(victims(up["name"])["tritonserver"])
        assert len(stubs) == len(shared_memory_of(state.instance_id)) == 2

    def told() -> tuple[Any, ...]:
        servers = json.loads(serving("status").stdout.splitlines()[-1])["servers"]
        row = next(row for row in servers if row["name"] == up["name"])
        return row["status"], row["health"], row["restarts"]

    # On a machine with other work a proof may come late, and the server is truly not ready for a moment.
    wait_until(lambda: told() == ("ready", up["health"], after), 20)


def test_where_no_stub_lives_and_requests_wait_in_turn_the_server_is_restarted(up: dict[str, Any]) -> None:
    assert health(up["health"])[0] == 200
    before = health(up["health"])[1]["restarts"]
    with Clients(up["http"], 24) as clients:
        wait_until(lambda: clients.right > 20, 20)
        for stub in stubs_of(victims(up["name"])["tritonserver"]):
            os.kill(stub.pid, signal.SIGKILL)
        wait_until(lambda: health(up["health"])[1]["restarts"]["server"] > before["server"], 10)
        assert "requests waited for steady, of which no stub was alive" in health(up["health"])[1]["reason"]
        wait_until(lambda: health(up["health"])[0] == 200, 60)
        right = clients.right
        wait_until(lambda: clients.right > right + 20, 20)
    assert clients.wrong == []
    after = health(up["health"])[1]["restarts"]
    assert after["server"] == before["server"] + 1
    assert after["models"] == before["models"]


def test_where_no_stub_lives_and_nobody_waits_the_model_is_loaded_anew(up: dict[str, Any]) -> None:
    assert health(up["health"])[0] == 200
    before = health(up["health"])[1]["restarts"]
    for stub in stubs_of(victims(up["name"])["tritonserver"]):
        os.kill(stub.pid, signal.SIGKILL)
    wait_until(lambda: health(up["health"])[0] == 503, 10)
    wait_until(lambda: health(up["health"])[0] == 200, 60)
    after = health(up["health"])[1]["restarts"]
    assert after["server"] == before["server"]
    assert after["models"]["steady"] > before["models"].get("steady", 0)


def test_other_answers_than_at_the_start_make_it_unready(up: dict[str, Any], repository: Path) -> None:
    assert health(up["health"])[0] == 200
    (repository / "steady" / "garbled").touch()
    try:
        wait_until(lambda: health(up["health"])[0] == 503, 20)
        assert "answers [0.89" in health(up["health"])[1]["models"]["tile_classifier"]["reason"]
    finally:
        (repository / "steady" / "garbled").unlink()
    wait_until(lambda: health(up["health"])[0] == 200, 20)
    assert not list(repository.rglob("__pycache__"))


def test_a_public_model_that_triton_drops_makes_it_unready(up: dict[str, Any]) -> None:
    from serving.triton_http import TritonHttp

    api = TritonHttp(up["http"], state_of(up["name"]).admin_token)
    api.unload("tile_classifier")
    wait_until(lambda: health(up["health"])[0] == 503, 20)
    assert "does not serve it" in health(up["health"])[1]["reason"]
    api.load("tile_classifier", timeout_s=20)
    wait_until(lambda: health(up["health"])[0] == 200, 20)


class FakeServer:
    """Stands in for a GuardedServer that starts once and never again."""

    starts = 0

    def __init__(self, plan: Plan) -> None:
        FakeServer.starts += 1

    def prove(self, deadline_s: float, waiting: Any, *, again: bool = False) -> list[str]:
        waiting()
        raise StartError("steady: no such file")

    def stop(self, grace_s: float) -> None:
        pass


def test_a_server_that_does_not_start_again_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(supervisor, "GuardedServer", FakeServer)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE_S", 0.0)
    state = InstanceState(
        "x", "1-x", "ready", 1, 1, "", "", "127.0.0.1:1", "", "", "", str(tmp_path / "log"), ""
    )
    prepared: list[bool] = []
    plan = Plan(None, state, tmp_path, None, None, [], lambda: prepared.append(True))  # type: ignore[arg-type]
    told: list[str] = []
    tried = Supervisor(plan, Health(), 1.0, told.append)
    with pytest.raises(StartError):
        tried.start(0.0)
    with pytest.raises(StartError, match=r"signal SIGSEGV\), and 5 restarts failed, .* no such file"):
        tried._restart("tritonserver ended (signal SIGSEGV)")
    assert FakeServer.starts == 6
    assert len(prepared) == 5
    assert told == ["restarting"]
    status, body = tried.health.readiness()
    assert status == 503
    assert "restart 5 failed" in body["reason"]


def test_a_server_that_ends_again_and_again_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(supervisor, "GuardedServer", FakeServer)
    monkeypatch.setattr(FakeServer, "prove", lambda *_, again=False: ["steady"])
    monkeypatch.setattr(FakeServer, "guardian", Health(), raising=False)
    monkeypatch.setattr(Health, "token_hidden", True, raising=False)
    monkeypatch.setattr(supervisor, "MOST_RESTARTS", 3)
    (tmp_path / "log").write_text("E its last words\n")
    state = InstanceState(
        "x", "1-x", "ready", 1, 1, "", "", "127.0.0.1:1", "", "", "", str(tmp_path / "log"), ""
    )
    plan = Plan(None, state, tmp_path, None, None, [], lambda: None)  # type: ignore[arg-type]
    tried = Supervisor(plan, Health(), 1.0, lambda _: None)
    tried.start(0.0)
    for _ in range(3):
        tried._restart("tritonserver ended (signal SIGKILL)")
    with pytest.raises(StartError, match=r"restarted 3 times within .*\n.*\n.*its last words"):
        tried._restart("tritonserver ended (signal SIGKILL)")


def test_the_log_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(supervisor, "LOG_BYTES", 100)
    monkeypatch.setattr(supervisor, "LOG_EVERY_S", -1.0)
    log = tmp_path / "x.log"
    state = InstanceState("x", "1-x", "ready", 1, 1, "", "", "127.0.0.1:1", "", "", "", str(log), "")
    plan = Plan(None, state, tmp_path, None, None, [], lambda: None)  # type: ignore[arg-type]
    watching = Supervisor(plan, Health(), 1.0, lambda _: None)
    with log.open("ab", buffering=0) as tritonserver:
        tritonserver.write(b"a" * 99)
        watching._rotate_log()
        assert log.stat().st_size == 99
        tritonserver.write(b"b" * 2)
        watching._rotate_log()
        tritonserver.write(b"c")
    assert log.read_bytes() == b"c"
    assert (tmp_path / "x.log.1").read_bytes() == b"a" * 99 + b"bb"
