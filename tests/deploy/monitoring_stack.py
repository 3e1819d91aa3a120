"""A real tritonserver, gateway, Prometheus and Alertmanager with the files of docker/, for the tests of a module."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from deploy import certificates
from deploy.benchmarks.guarded import free_port, running
from deploy.errors import DeployError
from deploy.gateway import GatewaySettings
from deploy.keys import KeyStore, Limits
from deploy.preview_prometheus import Prometheus
from serving.embedded import triton_home
from serving.instances import instances
from serving.processes import processes_of
from serving.stubs import STUB
from tests.deploy.gateway_stack import Stack

DOCKER = Path(__file__).parents[2] / "docker"
ALERTMANAGER = "prometheus-alertmanager"
needs_prometheus = pytest.mark.skipif(not shutil.which("prometheus"), reason="Prometheus is not installed")
needs_alertmanager = pytest.mark.skipif(
    not shutil.which(ALERTMANAGER), reason="Alertmanager is not installed"
)


def every_second(text: str) -> str:
    """Files of docker/prometheus and docker/alertmanager that scrape, evaluate and tell each second."""
    text = re.sub(
        r"(scrape_interval|evaluation_interval|scrape_timeout|^ +interval): \w+", r"\1: 1s", text, flags=re.M
    )
    return re.sub(r"(group_wait|group_interval): \w+", r"\1: 1s", text)


@dataclass
class Watched:
    """What runs. `notifications` are what Alertmanager sent: (receiver, status, alert's name) in their order."""

    stack: Stack
    prometheus: Prometheus
    prometheus_url: str
    alertmanager_url: str
    notifications: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def instance_id(self) -> str:
        """Of the server."""
        found = [state for state in instances(triton_home()) if state.http == self.stack.server["http"]]
        return found[0].instance_id

    def processes(self, program: str) -> list[int]:
        """Of the server, those that run this program."""
        found = []
        for pid in processes_of(self.instance_id):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if Path(os.fsdecode(words[0])).name == program:
                    found.append(pid)
        return found

    def kill_a_stub(self, model: str) -> None:
        """With SIGKILL."""
        for pid in self.processes(STUB):
            if f"/{model}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
                return
        raise AssertionError(f"no stub of {model}")

    def firing(self) -> set[str]:
        """Names of the alerts that Prometheus tells Alertmanager of."""
        return {
            alert["labels"]["alertname"]
            for alert in self.prometheus.get("alerts")["alerts"]
            if alert["state"] == "firing"
        }


@contextmanager
def watched(
    directory: Path,
    serve: Sequence[str],
    *,
    rewrite: Callable[[str], str] = every_second,
    alertmanager: bool = False,
) -> Iterator[Watched]:
    """All of it, until the block ends.

    Args:
        directory: empty.
        serve: arguments of `serving up` that say what is served.
        rewrite: what is done to each file of docker/prometheus and docker/alertmanager.
        alertmanager: whether Alertmanager runs too; else it is a target that does not answer.
    """
    with ExitStack() as parts:
        stack = parts.enter_context(_served(directory, serve))
        access_port = free_port()
        log = stack.settings.directory / "access.log"
        certificate = stack.settings.certificate
        command = [sys.executable, "-m", "deploy", "access-metrics", "--log", str(log)]
        command += ["--port", str(access_port), "--certificate", str(certificate)]
        parts.enter_context(_process(command, directory / "access-metrics.log"))
        own = free_port()
        notified: list[tuple[str, str, str]] = []
        alertmanager_port = free_port()
        if alertmanager:
            parts.enter_context(_alertmanager(directory, alertmanager_port, rewrite, notified))
        ports = {
            "triton": stack.server["metrics"].split("//")[1].removesuffix("/metrics"),
            "supervisor": stack.server["health"].split("//")[1],
            "gateway": f"127.0.0.1:{access_port}",
            "prometheus": f"127.0.0.1:{own}",
            "alertmanager": f"127.0.0.1:{alertmanager_port}",
        }
        parts.enter_context(_prometheus(directory, own, rewrite, ports))
        wait_for_port(access_port)
        url = f"http://127.0.0.1:{own}"
        yield Watched(stack, Prometheus(url), url, f"http://127.0.0.1:{alertmanager_port}", notified)


@contextmanager
def _served(directory: Path, serve: Sequence[str]) -> Iterator[Stack]:
    up = [sys.executable, "-m", "serving", "up", *serve]
    up += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    with (directory / "serving.log").open("wb") as errors:
        launcher = subprocess.Popen(up, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert launcher.stdout
        line = launcher.stdout.readline()
        assert line, (directory / "serving.log").read_text()
        server = json.loads(line)
        state = directory / "state"
        store = KeyStore(state / "keys")
        keys = {"lab": store.add("lab", Limits()), "narrow": store.add("narrow", Limits(in_flight=1))}
        files = certificates.make(state / "tls")
        settings = GatewaySettings(
            directory=state / "gateway", keys_file=store.prepare(), certificate=files.certificate,
            certificate_key=files.key, listen_port=free_port(), triton_http=server["http"],
            triton_grpc=server["grpc"], health=server["health"].removeprefix("http://"), in_flight=32, workers=1,
            candidate_http=server["http"], candidate_grpc=server["grpc"], canary_percent=20.0,
        )  # fmt: skip
        with running(settings):
            yield Stack(state, settings, server, keys)
    finally:
        launcher.terminate()
        try:
            launcher.wait(40)
        except subprocess.TimeoutExpired:
            launcher.kill()
            launcher.wait()


@contextmanager
def _process(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(list(command), stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _copied(source: Path, target: Path, rewrite: Callable[[str], str]) -> None:
    for path in source.rglob("*.yml"):
        if path.parent.name != "tests":
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(rewrite(path.read_text()))


@contextmanager
def _prometheus(
    directory: Path, port: int, rewrite: Callable[[str], str], targets: dict[str, str]
) -> Iterator[None]:
    own = directory / "prometheus"
    _copied(DOCKER / "prometheus", own, rewrite)
    (own / "targets").mkdir()
    for job, address in targets.items():
        (own / "targets" / f"{job}.json").write_text(json.dumps([{"targets": [address], "labels": {}}]))
    command = ["prometheus", f"--config.file={own / 'prometheus.yml'}", f"--storage.tsdb.path={own / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    log = directory / "prometheus.log"
    with _process(command, log):
        wait_for_port(port)
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        wait_for(lambda: bool(prometheus.now("up")), 30, log.read_text)
        yield


@contextmanager
def _alertmanager(
    directory: Path, port: int, rewrite: Callable[[str], str], notified: list[tuple[str, str, str]]
) -> Iterator[None]:
    class Receiver(BaseHTTPRequestHandler):
        told: ClassVar = notified

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            for alert in body["alerts"]:
                self.told.append((body["receiver"], alert["status"], alert["labels"]["alertname"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    own = directory / "alertmanager"
    _copied(DOCKER / "alertmanager", own, rewrite)
    config = own / "alertmanager.yml"
    config.write_text(config.read_text().replace("127.0.0.1:9095", f"127.0.0.1:{receiver.server_port}"))
    command = [ALERTMANAGER, f"--config.file={config}", f"--storage.path={own / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=", "--log.level=warn"]
    try:
        with _process(command, directory / "alertmanager.log"):
            wait_for_port(port)
            yield
    finally:
        receiver.shutdown()
        receiver.server_close()


@contextmanager
def under_load(ask: Callable[[threading.Event, int], None], clients: int) -> Iterator[None]:
    """So many threads of `ask(stop, number)`, which returns when `stop` is set, until the block ends."""
    stop = threading.Event()
    threads = [threading.Thread(target=ask, args=(stop, number), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)


def wait_for_port(port: int) -> None:
    """Until something listens there."""

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    wait_for(listens, 30, lambda: f"nothing listens on {port}")


def wait_for(condition: Callable[[], bool], timeout_s: float, told: Callable[[], Any] = str) -> float:
    """Seconds until the condition held; fails the test with what `told` says if it did not in time."""
    started_s = time.monotonic()
    while True:
        with contextlib.suppress(DeployError):
            if condition():
                return time.monotonic() - started_s
        assert time.monotonic() - started_s < timeout_s, told()
        time.sleep(0.2)


def tensor_body(name: str, shape: Sequence[int], items: Sequence[bytes]) -> tuple[str, bytes]:
    """Header line and body of one inference with a BYTES tensor, in Triton's binary extension."""
    data = b"".join(struct.pack("<I", len(item)) + item for item in items)
    tensor = {
        "name": name,
        "shape": list(shape),
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(data)},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    return f"Inference-Header-Content-Length: {len(head)}\r\n", head + data
