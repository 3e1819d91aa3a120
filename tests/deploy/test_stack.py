"""The whole service on this machine: `python -m deploy up` to `down`, in a path with a space, without root where root may give it up."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clients.errors import ClientError
from deploy.local_parts import fetch
from deploy.local_state import read_status
from serving.embedded import CHECKOUT
from serving.processes import start_time_ticks
from tests.deploy.local_stack import (
    ANY_PORT,
    Machine,
    Up,
    needs_all_programs,
    new_machine,
    new_stack,
    wait_for,
)

pytestmark = needs_all_programs
LISTENING = "0A"  # state of a socket in /proc/net/tcp (proc(5)), and 127.0.0.1 there, in IPv4 and IPv6
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with new_machine() as machine:
        yield machine


@pytest.fixture(scope="module")
def stack(machine: Machine) -> Up:
    return new_stack(machine)


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
    stack.classify()
    stack.classify("grpcs")  # again: nginx, which was killed, may have taken a line of its log with it
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
        wait_for(lambda query=query: stack.ask_prometheus(query), query)
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
