"""A server of one repository, started for a measurement and gone after it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from perf.errors import LoadError, PerfError
from perf.process_tree import cpu_s, descendants

_STOP_S = 40.0


@dataclass(frozen=True)
class BenchServer:
    """A server that is ready.

    Attributes:
        http, grpc: host:port.
        metrics: URL of its metrics.
        pid: of its launcher, the root of its process tree.
    """

    http: str
    grpc: str
    metrics: str
    pid: int

    def cpu_s(self) -> float:
        """CPU seconds that tritonserver, its stubs and those that look after them have used so far."""
        return cpu_s(descendants(self.pid))

    def requests(self, model: str) -> int:
        """Requests that a model has answered so far, by Triton's own count."""
        try:
            with urllib.request.urlopen(self.metrics, timeout=10) as answer:  # noqa: S310  # nosec B310  http of our own
                text = answer.read().decode()
        except OSError as error:
            raise LoadError(f"{self.metrics} does not answer: {error}") from error
        return requests_in(text, model)


def requests_in(metrics: str, model: str) -> int:
    """Successful requests of a model, all its versions, in Triton's metrics."""
    pattern = rf'^nv_inference_request_success\{{[^}}]*model="{re.escape(model)}"[^}}]*\}} ([0-9.e+]+)$'
    return round(sum(float(value) for value in re.findall(pattern, metrics, re.MULTILINE)))


@contextmanager
def serving(repository: Path) -> Iterator[BenchServer]:
    """`python -m serving up` on free ports, until the block ends.

    Raises:
        PerfError: it did not become ready; with its own error.
    """
    command = [sys.executable, "-m", "serving", "up", "--repository", str(repository), "--http-port", "0",
               "--grpc-port", "0", "--metrics-port", "0", "--open-api", "statistics"]  # fmt: skip
    with tempfile.TemporaryFile("w+") as errors:
        launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert launcher.stdout  # noqa: S101  opened above
            line = launcher.stdout.readline()
            if not line:
                errors.seek(0)
                lines = errors.read().strip().splitlines() or ["it said nothing"]
                told = next((line for line in lines if line.startswith("error: ")), lines[-1])
                raise PerfError(f"the server did not start: {told.removeprefix('error: ')}")
            said = json.loads(line)
            yield BenchServer(said["http"], said["grpc"], said["metrics"], launcher.pid)
        finally:
            launcher.terminate()
            try:
                launcher.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()
            if launcher.stdout:
                launcher.stdout.close()
