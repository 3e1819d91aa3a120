"""The backends `onnxruntime` and `openvino` take all cores for a lone execution, and one an instance under load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from serving.processes import shared_memory_of
from slides import lone_execution
from tests.serving.conftest import TINY_CONFIG, Launch, make_tiny, wait_until
from tests.serving.test_backends import add_openvino, parameter
from tests.serving.test_launcher import infer

THREADS = {
    "onnxruntime": {"intra_op_thread_count": "1", "alone_thread_count": "2"},
    "openvino": {"INFERENCE_NUM_THREADS": "1", "alone_thread_count": "2"},
}


@pytest.fixture
def neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[lone_execution.Neighbours]:
    """The class that tells whether others execute, with its tables in a directory of this test."""
    monkeypatch.setattr(lone_execution, "_SHARED_MEMORY", str(tmp_path))
    return lone_execution.Neighbours


def test_a_lone_execution_takes_the_cores_that_the_process_may_use() -> None:
    assert lone_execution.threads_alone(3) == 3
    assert lone_execution.threads_alone(0) == min(len(os.sched_getaffinity(0)), 8)


@pytest.mark.parametrize("server", ["", "../elsewhere"])
def test_outside_of_a_server_of_ours_there_are_no_neighbours(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOTLINE_INSTANCE", server)
    assert lone_execution.neighbours_here() is None


def test_an_execution_is_alone_unless_another_instance_executes(
    neighbours: type[lone_execution.Neighbours],
) -> None:
    one, other = neighbours("s"), neighbours("s")
    elsewhere = neighbours("another_server")
    with one.executing() as alone:
        assert alone
        with other.executing() as second_alone, elsewhere.executing() as third_alone:
            assert not second_alone
            assert third_alone
    with pytest.raises(RuntimeError), other.executing():
        raise RuntimeError
    with one.executing() as alone:
        assert alone


def test_a_dead_stub_is_forgotten_and_its_row_taken_over(
    neighbours: type[lone_execution.Neighbours], tmp_path: Path
) -> None:
    one = neighbours("s")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    one.rows[7] = gone.pid, 1  # it executed when it was killed, long ago
    with one.executing() as alone:
        assert alone
    for row in range(7):
        one.rows[row] = os.getpid(), 0
    assert neighbours("s").own == 7
    assert neighbours("s").own == 8


@pytest.mark.parametrize("backend", sorted(THREADS))
def test_two_instances_share_a_table_that_goes_with_the_server(
    backend: str, launch: Launch, tmp_path: Path
) -> None:
    config = TINY_CONFIG.replace("count: 1", "count: 2").replace("onnxruntime", backend)
    config += "".join(parameter(key, value) for key, value in (THREADS[backend] | {"niceness": "7"}).items())
    repository = tmp_path / "models"
    if backend == "openvino":
        add_openvino(repository, config, name="tiny")
    else:
        make_tiny(repository, config=config)
    launched = launch(repository)
    said = launched.ready()
    state = json.loads((Path(said["log"]).parent / f"{said['name']}.json").read_text())
    tables = [path for path in shared_memory_of(state["instance_id"]) if path.name.endswith("_executing")]
    assert len(tables) == 1
    for _ in range(4):
        assert infer(said["http"]) == [3.0, -4.0]
    rows = np.frombuffer(tables[0].read_bytes(), np.int64).reshape(-1, 2)
    stubs = [int(pid) for pid in rows[:, 0] if pid]
    assert len(stubs) == 2
    nicer = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 7)
    for pid in stubs:  # all threads, those of the network too
        threads = [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
        assert os.getpriority(os.PRIO_PROCESS, pid) == nicer
        assert sum(os.getpriority(os.PRIO_PROCESS, thread) == nicer for thread in threads) >= 2
    assert not rows[:, 1].any()
    launched.process.terminate()
    launched.process.wait(30)
    wait_until(lambda: not tables[0].exists(), 5)
