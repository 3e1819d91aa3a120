"""The backend `onnxruntime` takes all cores for a lone execution, and one an instance under load."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from serving.processes import shared_memory_of
from tests.serving.conftest import TINY_CONFIG, Launch, make_tiny, wait_until

BACKEND = Path(__file__).parents[2] / "serving" / "backends" / "onnxruntime" / "model.py"
THREADS = """
instance_group { count: 1 kind: KIND_CPU }
parameters { key: "intra_op_thread_count" value { string_value: "1" } }
parameters { key: "alone_thread_count" value { string_value: "2" } }
"""


@pytest.fixture
def neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class that tells whether others execute. Triton's module exists in its stubs only; nothing of it is used."""
    monkeypatch.setitem(
        sys.modules, "triton_python_backend_utils", types.ModuleType("triton_python_backend_utils")
    )
    spec = importlib.util.spec_from_file_location("onnxruntime_backend", BACKEND)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHARED_MEMORY", str(tmp_path))
    return module.Neighbours


def test_an_execution_is_alone_unless_another_instance_executes(neighbours: Any) -> None:
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


def test_a_dead_stub_is_forgotten_and_its_row_taken_over(neighbours: Any, tmp_path: Path) -> None:
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


def test_two_instances_share_a_table_that_goes_with_the_server(launch: Launch, tmp_path: Path) -> None:
    config = TINY_CONFIG.replace("instance_group { count: 1 kind: KIND_CPU }", THREADS).replace(
        "count: 1", "count: 2"
    )
    launched = launch(make_tiny(tmp_path / "models", config=config))
    said = launched.ready()
    state = json.loads((Path(said["log"]).parent / f"{said['name']}.json").read_text())
    tables = [path for path in shared_memory_of(state["instance_id"]) if path.name.endswith("_executing")]
    assert len(tables) == 1
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
    for _ in range(4):
        request = urllib.request.Request(
            f"http://{said['http']}/v2/models/tiny/infer", json.dumps(body).encode()
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert json.load(answer)["outputs"][0]["data"] == [2, 4]
    import numpy as np

    rows = np.frombuffer(tables[0].read_bytes(), np.int64).reshape(-1, 2)
    assert np.count_nonzero(rows[:, 0]) == 2
    assert not rows[:, 1].any()
    launched.process.terminate()
    launched.process.wait(30)
    wait_until(lambda: not tables[0].exists(), 5)
