"""A real `mlflow server`, as `make mlflow-ui` starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


class MLflowServer:
    """A real `mlflow server` on a database, as `make mlflow-ui` starts it."""

    def __init__(self, database: Path, port: int) -> None:
        self.uri = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{database}"]
        command += ["--artifacts-destination", str(database.parent / "served artifacts")]
        environment = {
            **os.environ,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        self._log = (database.parent / "server.log").open("ab")
        self._process = subprocess.Popen(
            command,
            cwd=database.parent,
            env=environment,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                assert self._process.poll() is None
                assert time.monotonic() < deadline_s
                time.sleep(0.1)

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
