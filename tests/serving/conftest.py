"""Servers that a test starts and that are gone when it ends, and a tiny ONNX repository that loads in a second."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

ANY_PORT = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
TINY_CONFIG = """
backend: "onnxruntime"
max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: [ 2 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 2 ] }
instance_group { count: 1 kind: KIND_CPU }
"""


@dataclass
class Launched:
    """A `python -m serving up` that runs."""

    process: subprocess.Popen[str]
    lines: queue.Queue[str]

    def ready(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """Its JSON line."""
        line = self.lines.get(timeout=timeout_s)
        assert line, f"the launcher ended: {self.errors()}"
        return dict(json.loads(line))

    def errors(self) -> str:
        """What it wrote to standard error until its end."""
        assert self.process.stderr
        return self.process.stderr.read()


Launch = Callable[..., Launched]


def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    assert process.stdout
    for line in process.stdout:
        lines.put(line)
    lines.put("")


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Starts `serving up`; whatever it started is stopped at the end of the test."""
    with launching() as start:
        yield start


@contextmanager
def launching() -> Iterator[Launch]:
    """The same for other scopes."""
    started: list[Launched] = []

    def start(
        repository: Path,
        *arguments: str,
        env: dict[str, str] | None = None,
        before: tuple[str, ...] = (),
    ) -> Launched:
        up = [sys.executable, "-m", "serving", "up", "--repository", str(repository), *ANY_PORT]
        process = subprocess.Popen(
            [*before, *up, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        launched = Launched(process, queue.Queue())
        threading.Thread(target=_read, args=(process, launched.lines), daemon=True).start()
        started.append(launched)
        return launched

    try:
        yield start
    finally:
        for launched in started:
            launched.process.kill()  # the guardian cleans up, which test_launcher.py proves
            launched.process.wait()


@pytest.fixture
def tiny_repository(tmp_path: Path) -> Path:
    """A repository, in a path with a space, whose one model `tiny` doubles its input."""
    return make_tiny(tmp_path / "a repository")


def make_tiny(
    repository: Path, *, config: str = TINY_CONFIG, file_name: str = "model.onnx", name: str = "tiny"
) -> Path:
    """Add the model to a repository."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "tiny", [x], [y])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9),
        version / file_name,
    )
    (repository / name / "config.pbtxt").write_text(config)
    return repository


def wait_until(condition: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until the condition held; fails the test if it did not within `timeout_s`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, "the condition did not come true in time"
        time.sleep(0.05)
    return time.monotonic() - started
