"""The whole service on this machine: `python -m deploy up` to `down`, in a path with a space, without root where root may give it up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients import SlideClient
from clients.errors import ClientError
from deploy.local_parts import fetch
from deploy.local_settings import PORT_NAMES
from deploy.local_state import read_status
from serving.benchmarks.tiny_release import make_release
from serving.embedded import CHECKOUT, triton_home
from serving.processes import start_time_ticks
from tests.one_level_tiff import write_one_level_bigtiff

PROGRAMS = ("nginx", "prometheus", "prometheus-alertmanager")
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

ANY_PORT = [word for name in PORT_NAMES for word in (f"--{name.replace('_', '-')}-port", "0")]
WAIT_S = 120.0
LISTENING = "0A"  # state of a socket in /proc/net/tcp (proc(5)), and 127.0.0.1 there, in IPv4 and IPv6
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108


@contextmanager
def without_root() -> Iterator[list[str]]:
    """What to put before a command so that it has no right of root; nothing where that cannot be or is so already."""
    new = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    if os.geteuid() or subprocess.run([*new, "true"], capture_output=True, check=False).returncode:
        yield []
        return
    holder = subprocess.Popen([*new, "sleep", "infinity"])
    before = ["nsenter", "--user", "--preserve-credentials", f"--target={holder.pid}"]
    try:
        wait_for(
            lambda: (
                subprocess.run([*before, "id", "-u"], capture_output=True, check=False).stdout == b"1000\n"
            )
        )
        yield before
    finally:
        holder.kill()
        holder.wait()


@dataclass
class Machine:
    """Where stacks of this module run: a home of their own for state, and who they run as."""

    top: Path
    before: list[str]
    taken: list[str]

    def words(self, *words: str | Path) -> list[str]:
        """`python -m deploy ...`."""
        return [*self.before, sys.executable, "-m", "deploy", *map(str, words)]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "CLOTLINE_TRITON_HOME": str(self.top / "home"), "HOME": str(self.top)}

    def deploy(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """`python -m deploy ...`, to its end."""
        return subprocess.run(
            self.words(*words),
            cwd=CHECKOUT,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )

    def up(self, *words: str | Path) -> dict[str, Any]:
        """`deploy up`, which must not fail."""
        done = self.deploy("up", *words)
        assert done.returncode == 0, done.stderr
        self.taken += [done.stdout, done.stderr]
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.deploy("status", "--json").stdout))

    def processes(self) -> list[str]:
        """Command lines of all living processes that name this directory, or work in it, or carry it in their environment."""
        mark, found = str(self.top).encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if entry.name == str(os.getpid()) or (entry / "stat").read_text().split(") ")[1][0] == "Z":
                    continue
                told = [(entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()]
                told.append(os.readlink(entry / "cwd").encode())
            except OSError:
                continue
            if any(mark in text for text in told):
                found.append(told[0].replace(b"\0", b" ").decode())
        return found


@dataclass
class Up:
    """The stack of this module, and what its `up` said."""

    machine: Machine
    said: dict[str, Any]
    releases: dict[str, Path]
    slide: Path

    @property
    def state(self) -> Path:
        return Path(self.said["state"])

    def pids(self) -> dict[str, int]:
        """Of supervisor and parts, now."""
        status = read_status(self.state)
        return {"supervisor": status["pid"], **{name: part["pid"] for name, part in status["parts"].items()}}

    @property
    def key(self) -> str:
        return Path(self.said["key_file"]).read_text().strip()

    def classify(self, scheme: str = "https", *, key: str | None = None) -> Any:
        """The slide, through the gateway, with our client."""
        url = self.said["url"].replace("https", scheme)
        with SlideClient(
            url, api_key=self.key if key is None else key, ca=self.said["ca"], retries=0
        ) as client:
            return client.predict(self.slide)

    def ask_prometheus(self, query: str) -> list[dict[str, Any]]:
        from urllib.parse import quote

        address = self.said["addresses"]["prometheus"]
        status, body = fetch(f"{address}/api/v1/query?query={quote(query)}")
        assert status == 200, body
        return list(json.loads(body)["data"]["result"])


def wait_for(what: Callable[[], Any]) -> Any:
    """Its first true value."""
    deadline_s = time.monotonic() + WAIT_S
    while not (value := what()):
        assert time.monotonic() < deadline_s, what
        time.sleep(0.2)
    return value


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with without_root() as before, tempfile.TemporaryDirectory(prefix="stack with spaces ") as name:
        top = Path(name)
        (top / "home").mkdir()
        for installed in ("server", "python", "installed.json"):
            (top / "home" / installed).symlink_to(triton_home() / installed)
        machine = Machine(top, before, [])
        yield machine
        machine.deploy("down")


@pytest.fixture(scope="module")
def stack(machine: Machine) -> Up:
    releases = {
        name: make_release(machine.top / "my releases" / name, bias=bias)
        for name, bias in (("a", -4.0), ("b", 2.0))
    }
    rng = np.random.default_rng(3)
    tissue_HWC = rng.normal((190, 90, 140), 22, (128, 128, 3)).clip(0, 255).astype(np.uint8)
    slide = machine.top / "p1_0.tif"
    write_one_level_bigtiff(slide, 2048, [np.full((128, 128, 3), 243, np.uint8), tissue_HWC])
    said = machine.up("--release", releases["a"], *ANY_PORT)
    return Up(machine, said, releases, slide)


def test_a_slide_is_classified_through_tls_with_the_first_key(stack: Up) -> None:
    over_http, over_grpc = stack.classify(), stack.classify("grpcs")
    assert over_http.probabilities == pytest.approx(over_grpc.probabilities, abs=1e-6)
    assert len(over_http.tiles) == 4
    with pytest.raises(ClientError, match=r"401|key"):
        stack.classify(key="clk_" + "0" * 64)


def test_the_key_is_in_one_file_and_told_nowhere(stack: Up) -> None:
    assert Path(stack.said["key_file"]).stat().st_mode & 0o777 == 0o600
    assert stack.state.stat().st_mode & 0o777 == 0o700
    files = [path for path in stack.state.rglob("*") if path.is_file() and path.parent.name != "keys"]
    assert any(path.name == "access.log" for path in files)
    holding = [path for path in files if stack.key.encode() in path.read_bytes()]
    assert holding == []
    assert not any(stack.key in text for text in stack.machine.taken)
    assert not any(stack.key in words for words in stack.machine.processes())


def test_nothing_has_a_right_of_root(stack: Up) -> None:
    if not stack.machine.before:
        pytest.skip("this system lets nobody give up root")
    for pid in stack.said["pids"].values():
        assert Path(f"/proc/{pid}/status").read_text().split("CapEff:")[1].split()[0] == "0" * 16


def test_only_loopback_is_listened_on(stack: Up) -> None:
    ports = {int(word.rsplit(":", 1)[1].split("/")[0].split(",")[0])
             for address in stack.said["addresses"].values() for word in address.split() if ":" in word}  # fmt: skip
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in Path(table).read_text().splitlines()[1:]:
            address, port = row.split()[1].split(":")
            if row.split()[3] == LISTENING and int(port, 16) in ports:
                found.append(address)
    assert len(found) >= 7
    assert set(found) <= LOOPBACK


def test_a_second_up_changes_nothing(stack: Up) -> None:
    again = stack.machine.up()
    assert again["changed"] == []
    for key in ("pids", "url", "ca", "addresses", "key_file", "release_id"):
        assert again[key] == stack.said[key]


def test_a_killed_nginx_is_replaced_with_its_workers(stack: Up) -> None:
    def gateway() -> dict[str, Any]:
        return dict(read_status(stack.state)["parts"]["gateway"])

    master = gateway()["pid"]
    workers = Path(f"/proc/{master}/task/{master}/children").read_text().split()
    assert workers
    os.kill(master, signal.SIGKILL)
    wait_for(lambda: gateway()["restarts"] == 1 and gateway()["ready"])
    assert not any(start_time_ticks(int(worker)) for worker in workers)
    assert stack.classify().label
    restarts = {name: part["restarts"] for name, part in read_status(stack.state)["parts"].items()}
    assert restarts == {**dict.fromkeys(restarts, 0), "gateway": 1}


def test_another_release_moves_in_without_a_restart(stack: Up) -> None:
    before = stack.classify()
    pids = stack.pids()
    said = stack.machine.up("--release", stack.releases["b"])
    assert said["release_id"] == json.loads((stack.releases["b"] / "release.json").read_text())["release_id"]
    assert said["release_id"] != stack.said["release_id"]
    assert (said["changed"], said["pids"]) == (["release"], pids)
    after = stack.classify()
    assert after.model_version != before.model_version
    assert after.probabilities["CE"] > before.probabilities["CE"] + 0.1


def test_what_cannot_be_changed_leaves_all_as_it_was(stack: Up) -> None:
    before = stack.pids()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = stack.machine.deploy("up", "--gateway-port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert "cannot be used" in done.stderr
    done = stack.machine.deploy("up", "--release", stack.machine.top)
    assert done.returncode != 0
    assert "is no release" in done.stderr
    after = stack.machine.up()
    assert (after["changed"], stack.pids()) == ([], before)
    assert after["release_id"] == json.loads((stack.releases["b"] / "release.json").read_text())["release_id"]
    assert stack.classify().label


def test_a_start_that_fails_leaves_nothing(stack: Up) -> None:
    machine, state = stack.machine, stack.machine.top / "another state"
    running = len(machine.processes())
    broken = machine.top / "broken models"
    (broken / "m" / "1").mkdir(parents=True)
    (broken / "m" / "config.pbtxt").write_text('name: "m"\nbackend: "python"\n')
    (broken / "m" / "1" / "model.py").write_text("raise RuntimeError('it does not start')\n")
    port = stack.said["url"].rsplit(":", 1)[1]
    for words, error in (
        (("--release", stack.releases["a"], *ANY_PORT, "--gateway-port", port), f"port {port} on 127.0.0.1"),
        (("--release", machine.top, *ANY_PORT), "is no release"),
        (("--repository", broken, *ANY_PORT), "it does not start"),
    ):
        done = machine.deploy("up", "--state", state, *words)
        assert done.returncode != 0
        assert f"{error}" in done.stderr
        assert "Traceback" not in done.stderr
        assert [path.name for path in state.iterdir()] == ["logs"]
        assert len(machine.processes()) == running
    with subprocess.Popen(machine.words("up", "--state", state, "--release", stack.releases["a"], *ANY_PORT),
                          cwd=CHECKOUT, env=machine.environment(), stderr=subprocess.PIPE, text=True) as interrupted:  # fmt: skip
        wait_for(lambda: "triton" in read_status(state).get("parts", {}))
        interrupted.terminate()
        told = interrupted.communicate()[1]
    assert interrupted.returncode == 130
    assert "rolled back" in told
    assert [path.name for path in state.iterdir()] == ["logs"]
    assert not any("another state" in words for words in machine.processes())


def test_metrics_are_in_prometheus_and_every_alert_is_quiet(stack: Up) -> None:
    up = wait_for(lambda: [row for row in [stack.ask_prometheus("up == 1")] if len(row) == 5])[0]
    assert {row["metric"]["job"] for row in up} == {
        "triton",
        "supervisor",
        "gateway",
        "prometheus",
        "alertmanager",
    }
    for query in (
        'sum(clotline_gateway_requests_total{route="infer",status="200",key="first.1",protocol="http"}) > 0',
        'sum(clotline_gateway_requests_total{route="infer",status="200",key="first.1",protocol="grpc"}) > 0',
        "sum(nv_inference_request_success) > 0",
        "sum(clotline_tile_appearance_count) > 0",
        "clotline_ready == 1",
        "clotline_certificate_expiry_timestamp_seconds > time() + 86400",
    ):
        wait_for(lambda query=query: stack.ask_prometheus(query))
    assert stack.ask_prometheus('ALERTS{alertstate="firing"}') == []
    status = stack.machine.status()
    assert status["ready"] is True
    assert status["targets_down"] == []
    assert [alert for alert in status["alerts"] if alert["state"] == "firing"] == []


def test_every_target_says_what_it_sends(stack: Up) -> None:
    """Prometheus 3, which the containers have, scrapes nothing without a content type; 2.42 here would not complain."""
    targets = json.loads(fetch(stack.said["addresses"]["prometheus"] + "/api/v1/targets")[1])["data"][
        "activeTargets"
    ]
    assert len(targets) == 5
    for target in targets:
        with urllib.request.urlopen(target["scrapeUrl"], timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith(("text/plain", "application/openmetrics-text"))


def test_logs_are_told_by_part(stack: Up) -> None:
    told = stack.machine.deploy("logs", "--lines", "1").stdout
    names = {line.split()[0] for line in told.splitlines()}
    assert names >= {"supervisor", "triton", "tritonserver", "access"}
    unknown = stack.machine.deploy("logs", "nothing")
    assert unknown.returncode == 2
    assert "there is no log of 'nothing'" in unknown.stderr


def test_down_leaves_nothing(stack: Up) -> None:
    pid = stack.said["pids"]["triton"]
    assert stack.machine.processes() != []
    assert list(SHARED_MEMORY.glob(f"clotline_{pid}-*")) != []
    done = stack.machine.deploy("down")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"stopped": True, "clean": True}
    assert stack.machine.processes() == []
    assert list((stack.machine.top / "home" / "run").glob("*.json")) == []
    assert list(SHARED_MEMORY.glob(f"clotline_{pid}-*")) == []
    for address in (stack.said["url"], stack.said["addresses"]["prometheus"]):
        with pytest.raises(OSError, match="refused"):
            fetch(address + "/", ca=stack.said["ca"])
    assert {path.name for path in stack.state.iterdir()} == {"data", "keys", "lock", "logs", "tls"}
    assert json.loads(stack.machine.deploy("down").stdout) == {"stopped": False, "clean": True}
    nothing = stack.machine.deploy("status", "--json")
    assert nothing.returncode == 1
    assert json.loads(nothing.stdout)["parts"] == []
