"""`serving up`, `down`, `status` with a real tritonserver: start, stop, kill, side by side, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from serving.embedded import triton_home
from serving.instances import InstanceState
from serving.processes import processes_of, shared_memory_of
from tests.serving.conftest import Launch, make_tiny, wait_until
from tests.serving.public_model import health


def infer(http: str, model: str = "tiny") -> list[float]:
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.5, -2]}]}
    request = urllib.request.Request(f"http://{http}/v2/models/{model}/infer", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=10) as answer:
        return list(json.load(answer)["outputs"][0]["data"])


def serving(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serving", *arguments], capture_output=True, text=True, timeout=90, check=False
    )


def state_of(name: str) -> InstanceState:
    return InstanceState(**json.loads((triton_home() / "run" / f"{name}.json").read_text()))


def test_two_servers_side_by_side_then_down(tiny_repository: Path, launch: Launch) -> None:
    first, second = launch(tiny_repository), launch(tiny_repository, "--name", "second")
    one, two = first.ready(), second.ready()
    assert one["status"] == "ready"
    assert one["models"] == ["tiny"]
    assert one["repository"] == str(tiny_repository)
    assert health(one["health"])[0] == health(two["health"], "/live")[0] == 200
    assert infer(one["http"]) == infer(two["http"]) == [3.0, -4.0]
    with urllib.request.urlopen(one["metrics"], timeout=10) as answer:
        assert b"nv_inference_request_success" in answer.read()
    listed = json.loads(serving("status").stdout.splitlines()[-1])["servers"]
    assert {row["name"]: row["status"] for row in listed}.items() >= {
        one["name"]: "ready",
        "second": "ready",
    }.items()
    state = state_of("second")
    stopped = serving("down", "--name", "second")
    assert json.loads(stopped.stdout) == {"stopped": ["second"], "clean": True}
    assert second.process.wait(5) == 0
    assert not processes_of(state.instance_id)
    assert not shared_memory_of(state.instance_id)
    assert infer(one["http"]) == [3.0, -4.0]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_gracefully(tiny_repository: Path, launch: Launch, signum: int) -> None:
    launched = launch(tiny_repository, "--name", f"signal{signum}")
    launched.ready()
    state = state_of(f"signal{signum}")
    assert len(processes_of(state.instance_id)) >= 3  # guardian, tritonserver, one stub
    assert shared_memory_of(state.instance_id)
    launched.process.send_signal(signum)
    assert launched.process.wait(20) == 0
    assert not processes_of(state.instance_id)
    assert not shared_memory_of(state.instance_id)
    assert not (triton_home() / "run" / f"signal{signum}.json").exists()


def test_kill_9_of_the_launcher_leaves_nothing_within_5_s(tiny_repository: Path, launch: Launch) -> None:
    launched = launch(tiny_repository, "--name", "killed")
    launched.ready()
    state = state_of("killed")
    os.kill(launched.process.pid, signal.SIGKILL)
    state_file = triton_home() / "run" / "killed.json"

    def gone() -> bool:
        left = processes_of(state.instance_id) or shared_memory_of(state.instance_id)
        return not left and not state_file.exists()  # which the guardian removes last

    wait_until(gone, 5.0)


def test_sigterm_during_the_start_leaves_nothing(tiny_repository: Path, launch: Launch) -> None:
    launched = launch(tiny_repository, "--name", "early")
    path = triton_home() / "run" / "early.json"
    wait_until(path.exists, 10)
    state = state_of("early")
    wait_until(lambda: len(processes_of(state.instance_id)) >= 2, 10)
    status, body = health(state.health)
    assert (status, body["reason"]) == (503, "starting")
    assert health(state.health, "/live")[0] == 200
    launched.process.terminate()
    assert launched.process.wait(30) == 130
    assert not processes_of(state.instance_id)
    assert not shared_memory_of(state.instance_id)


def test_detach_returns_when_ready(tiny_repository: Path) -> None:
    done = serving("up", "--repository", str(tiny_repository), "--http-port", "0", "--grpc-port", "0",
                   "--metrics-port", "0", "--name", "detached", "--detach")  # fmt: skip
    try:
        assert done.returncode == 0, done.stderr
        assert infer(json.loads(done.stdout.splitlines()[-1])["http"]) == [3.0, -4.0]
    finally:
        assert serving("down", "--name", "detached").returncode == 0


def test_a_port_in_use_is_named(tiny_repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = serving("up", "--repository", str(tiny_repository), "--http-port", port)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert f"http port {port}" in done.stderr
    assert "--http-port" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "holds no model"),
        (lambda path: path.write_text(""), "is not a directory"),
        (
            lambda path: (path / "tile_preprocess" / "1").mkdir(parents=True),
            "only tile_preprocess without a config",
        ),
    ],
)
def test_a_repository_without_models_is_refused(tmp_path: Path, make: object, says: str) -> None:
    make(tmp_path / "repository")  # type: ignore[operator]
    done = serving("up", "--repository", str(tmp_path / "repository"))
    assert done.returncode == 1
    assert says in done.stderr
    assert "python -m exporters export" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_does_not_load_is_named_with_its_reason(tiny_repository: Path, launch: Launch) -> None:
    make_tiny(tiny_repository, name="broken")
    (tiny_repository / "broken" / "1" / "model.onnx").write_bytes(b"no onnx")
    launched = launch(tiny_repository, "--name", "broken")
    assert launched.process.wait(60) == 1
    errors = launched.errors()
    assert "broken: " in errors
    assert "cannot load" in errors
    assert "Traceback" not in errors


def test_unknown_instances_and_bad_names_are_refused(tiny_repository: Path) -> None:
    assert "no server named nobody" in serving("down", "--name", "nobody").stderr
    done = serving("up", "--repository", str(tiny_repository), "--name", "../x", "--http-port", "0",
                   "--grpc-port", "0", "--metrics-port", "0")  # fmt: skip
    assert done.returncode == 1
    assert "is no instance name" in done.stderr
