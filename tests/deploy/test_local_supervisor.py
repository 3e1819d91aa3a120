"""The supervisor of a local stack, on small processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy import certificates
from deploy.gateway import GatewaySettings, check, command, remove_scratch, render
from deploy.keys import KeyStore
from deploy.local_parts import Part, Plan, fetch
from deploy.local_supervisor import PLAN, STATUS, move_aside, rotate
from serving.embedded import CHECKOUT
from tests.mlflow_server import free_port

WAIT_S = 60.0
SERVER = "import http.server, sys; http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind='127.0.0.1')"


def wait_for(what: Callable[[], Any]) -> Any:
    deadline_s = time.monotonic() + WAIT_S
    while not (value := what()):
        assert time.monotonic() < deadline_s, what
        time.sleep(0.05)
    return value


class Running:
    """A supervisor on a state directory."""

    def __init__(self, state: Path, *parts: Part) -> None:
        self.state = state
        Plan(1, parts).write(state / PLAN)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deploy.local_supervisor", str(state)],
            cwd=CHECKOUT,
            stdout=subprocess.DEVNULL,
        )

    def status(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.state / STATUS).read_text()))
        except (OSError, ValueError):
            return {}

    def pid(self, name: str) -> int:
        return int(self.status()["parts"][name]["pid"])

    def ready(self, *names: str) -> bool:
        parts = self.status().get("parts", {})
        return set(parts) == set(names) and all(part["ready"] for part in parts.values())

    def apply(self, generation: int, *parts: Part) -> None:
        Plan(generation, parts).write(self.state / PLAN)
        self.process.send_signal(signal.SIGHUP)
        wait_for(lambda: self.status()["generation"] == generation and self.status()["phase"] != "applying")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    directory = tmp_path / "a state"
    (directory / "logs").mkdir(parents=True)
    return directory


@pytest.fixture
def start(state: Path) -> Iterator[Callable[..., Running]]:
    started = []

    def begin(*parts: Part) -> Running:
        started.append(Running(state, *parts))
        return started[-1]

    yield begin
    for running in started:
        if running.process.poll() is None:
            running.process.terminate()
        running.process.wait(WAIT_S)


def web(state: Path, name: str, port: int) -> Part:
    """A web server."""
    url = f"http://127.0.0.1:{port}/"
    argv = (sys.executable, "-c", SERVER, str(port))
    return Part(name, argv, str(state / "logs" / f"{name}.log"), str(state), url)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


def test_parts_are_started_mended_changed_and_stopped(state: Path, start: Callable[..., Running]) -> None:
    a, b = web(state, "a", free_port()), web(state, "b", free_port())
    running = start(a, b)
    wait_for(lambda: running.ready("a", "b"))
    first = running.pid("a")
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: running.ready("a", "b") and running.pid("a") != first)
    assert running.status()["parts"]["a"]["restarts"] == 1

    kept, gone, c = running.pid("a"), running.pid("b"), web(state, "c", free_port())
    running.apply(2, a, c)
    assert running.status()["phase"] == "settled"
    assert running.pid("a") == kept
    assert set(running.status()["parts"]) == {"a", "c"}
    assert not alive(gone)

    pids = [running.pid("a"), running.pid("c")]
    running.process.terminate()
    assert running.process.wait(WAIT_S) == 0
    assert not any(map(alive, pids))
    assert running.status()["parts"] == {}


def test_a_part_that_only_reads_other_files_is_told_so(state: Path, start: Callable[..., Running]) -> None:
    code = (
        "import signal, sys, http.server\n"
        "def again(*_): open('heard', 'a').write('x')\n"
        "signal.signal(signal.SIGHUP, again)\n" + SERVER
    )
    port = free_port()
    part = replace(web(state, "a", port), argv=(sys.executable, "-c", code, str(port)), files_sha256="1",
                   reload_signal="SIGHUP")  # fmt: skip
    running = start(part)
    wait_for(lambda: running.ready("a"))
    pid = running.pid("a")
    running.apply(2, replace(part, files_sha256="2"))
    wait_for(lambda: (state / "heard").exists())
    assert running.pid("a") == pid
    running.apply(3, replace(part, files_sha256="2", reload_signal=""))
    assert running.pid("a") == pid, "nothing has changed"
    running.apply(4, replace(part, files_sha256="3", reload_signal=""))
    assert running.pid("a") != pid, "what cannot read them again is started anew"


def test_a_first_plan_that_fails_leaves_no_process(state: Path, start: Callable[..., Running]) -> None:
    a = web(state, "a", free_port())
    argv = (sys.executable, "-c", "import os; print('no luck', os.getpid()); raise SystemExit(3)")
    running = start(a, replace(web(state, "b", free_port()), argv=argv))
    assert running.process.wait(WAIT_S) == 1
    status = running.status()
    assert "b ended during its start, exit code 3" in status["error"]
    assert "no luck" in status["error"]
    assert status["parts"] == {}
    with pytest.raises(OSError, match="refused"):
        fetch(a.ready_url)


def test_a_later_plan_that_fails_says_so_and_keeps_the_rest(
    state: Path, start: Callable[..., Running]
) -> None:
    a, port = web(state, "a", free_port()), free_port()
    running = start(a)
    wait_for(lambda: running.ready("a"))
    pid = running.pid("a")
    never = replace(
        web(state, "b", port), argv=(sys.executable, "-c", "import time; time.sleep(60)"), ready_s=0.5
    )
    running.apply(2, a, never)
    assert running.status()["phase"] == "failed"
    assert "b is not ready after 0 s" in running.status()["error"].replace("0.5", "0")
    running.apply(3, a)
    assert running.status()["phase"] == "settled"
    assert (running.pid("a"), set(running.status()["parts"])) == (pid, {"a"})


def test_parts_end_with_a_killed_supervisor(state: Path, start: Callable[..., Running]) -> None:
    running = start(web(state, "a", free_port()))
    wait_for(lambda: running.ready("a"))
    pid = running.pid("a")
    running.process.kill()
    wait_for(lambda: not alive(pid))


def test_what_dies_at_once_is_not_started_in_a_loop(state: Path, start: Callable[..., Running]) -> None:
    port = free_port()
    marker = state / "die"
    code = f"import os, sys\nif os.path.exists({str(marker)!r}): sys.exit(1)\n" + SERVER
    running = start(replace(web(state, "a", port), argv=(sys.executable, "-c", code, str(port))))
    wait_for(lambda: running.ready("a"))
    marker.touch()
    os.kill(running.pid("a"), signal.SIGKILL)
    time.sleep(2)
    assert 1 <= running.status()["parts"]["a"]["restarts"] <= 3
    marker.unlink()
    wait_for(lambda: running.ready("a"))


def test_logs_are_kept_short(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"x" * 100)
        rotate(log, 100)
        assert log.stat().st_size == 100
        writer.write(b"y")
        rotate(log, 100)
        assert (log.stat().st_size, (tmp_path / "a.log.1").stat().st_size) == (0, 101)
        writer.write(b"z")
        assert log.read_bytes() == b"z"
    assert not move_aside(log, 100)
    assert move_aside(log, 0)
    assert (log.exists(), (tmp_path / "a.log.1").read_bytes()) == (False, b"z")
    rotate(tmp_path / "nothing", 0)
    assert not move_aside(tmp_path / "nothing", 0)


def answers(url: str, ca: Path) -> bool:
    try:
        return fetch(url, ca=str(ca))[0] == 401
    except OSError:
        return False


@pytest.mark.skipif(
    not shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"), reason="nginx is not installed"
)
def test_nginx_opens_a_renamed_log_anew(tmp_path: Path) -> None:
    directory = tmp_path / "a gateway"
    files = certificates.make(tmp_path / "tls")
    settings = GatewaySettings(directory=directory, keys_file=KeyStore(tmp_path / "keys").prepare(), workers=1,
                               certificate=files.certificate, certificate_key=files.key, listen_port=free_port())  # fmt: skip
    conf = render(settings)
    check(conf)
    log, old = directory / "access.log", directory / "access.log.1"
    nginx = subprocess.Popen(command(conf), stderr=subprocess.DEVNULL)
    try:
        url = f"https://localhost:{settings.listen_port}/v2"
        wait_for(lambda: answers(url, files.ca))
        wait_for(lambda: log.stat().st_size)
        asked = 1
        assert move_aside(log, 0)
        nginx.send_signal(signal.SIGUSR1 if os.geteuid() else signal.SIGHUP)
        wait_for(log.exists)
        while not log.stat().st_size:
            assert answers(url, files.ca)
            asked += 1
        wait_for(lambda: len(log.read_text().splitlines() + old.read_text().splitlines()) == asked)
    finally:
        nginx.terminate()
        nginx.wait(WAIT_S)
        remove_scratch(directory)
