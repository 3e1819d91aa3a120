"""The shadow in a process or in this one, real tritonservers of tiny releases for it, and servers that behave badly, named so."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2

from deploy.benchmarks.guarded import free_port
from deploy.shadow import Shadow, ShadowServer, ShadowSettings
from perf.bench_server import BenchServer, serving
from serving.benchmarks.tiny_release import make_release, tiles

INFER = "/v2/models/tile_classifier/infer"
TILE = tiles(64)[0]
BAD_TILE = b"no image"
ALL = ("probabilities", "label_index")
STABLE_BIAS, OTHER_BIAS = -1.0, -9.0


@dataclass
class Running:
    """A shadow, in a process or in this one."""

    port: int
    log: Path
    process: subprocess.Popen[str] | None = None

    def post(self, path: str, body: bytes | Iterator[bytes], headers: dict[str, str] | None = None) -> int:
        """The status; an iterator is sent in chunks."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("POST", path, body, headers or {})
            return connection.getresponse().status
        finally:
            connection.close()

    def raw(self, request: bytes) -> bytes:
        """The first line that comes back."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(request)
            return connection.makefile("rb").readline()

    def samples(self) -> dict[tuple[str, ...], float]:
        """(name, values of its labels in the order of their names...) -> value, without buckets."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return {
            (sample.name.removeprefix("clotline_shadow_"), *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if "le" not in sample.labels
        }

    def results(self) -> dict[tuple[str, str], float]:
        """(model, result) -> requests."""
        return {key[1:]: value for key, value in self.samples().items() if key[0] == "requests_total"}  # type: ignore[misc]

    def wait(self, count: int) -> dict[tuple[str, str], float]:
        """`results` once they are so many."""
        wait_until(lambda: sum(self.results().values()) >= count)
        return self.results()

    def lines(self) -> list[dict[str, Any]]:
        """Of the log."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_s, "the condition did not come true in time"
        time.sleep(0.02)


def rest(tile: bytes, outputs: Sequence[dict[str, Any]] = ()) -> tuple[bytes, dict[str, str]]:
    """Body and headers of one inference, with the answer in the binary extension unless `outputs` say otherwise."""
    tensor = {
        "name": "tile",
        "shape": [1, 1],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": 4 + len(tile)},
    }
    wanted = outputs or [{"name": name, "parameters": {"binary_data": True}} for name in ALL]
    head = json.dumps({"inputs": [tensor], "outputs": wanted}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return head + struct.pack("<I", len(tile)) + tile, headers


def frame(tile: bytes, outputs: Sequence[str] = ALL) -> bytes:
    """One inference as nginx passes it on from gRPC."""
    request = service_pb2.ModelInferRequest(model_name="tile_classifier")
    request.inputs.add(name="tile", datatype="BYTES", shape=[1, 1])
    request.raw_input_contents.append(struct.pack("<I", len(tile)) + tile)
    for name in outputs:
        request.outputs.add(name=name)
    message = request.SerializeToString()
    return struct.pack(">BI", 0, len(message)) + message


def arguments(stable: tuple[str, str], candidate: tuple[str, str], port: int, log: Path) -> list[str]:
    sides = zip(
        ("--stable-http", "--stable-grpc", "--candidate-http", "--candidate-grpc"),
        (*stable, *candidate),
        strict=True,
    )
    return [sys.executable, "-m", "deploy", "shadow", *(word for pair in sides for word in pair),
            "--port", str(port), "--log", str(log)]  # fmt: skip


@contextmanager
def shadow_process(stable: tuple[str, str], candidate: tuple[str, str], directory: Path) -> Iterator[Running]:
    """`python -m deploy shadow`, killed at the end if it still runs."""
    port, log = free_port(), directory / "differences.jsonl"
    process = subprocess.Popen(arguments(stable, candidate, port, log), stderr=subprocess.PIPE, text=True)
    running = Running(port, log, process)
    try:
        wait_until(lambda: process.poll() is not None or healthy(port))
        yield running
    finally:
        process.kill()
        process.communicate()


@contextmanager
def shadow_here(
    directory: Path, stable: tuple[str, str], candidate: tuple[str, str], **limits: Any
) -> Iterator[Running]:
    """The same in this process, for other limits."""
    log = directory / "differences.jsonl"
    shadow = Shadow(ShadowSettings(stable, candidate, log, **limits))
    server = ShadowServer(shadow, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield Running(server.server_address[1], log)
    finally:
        server.shutdown()
        server.server_close()
        shadow.close()


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def sides(server: BenchServer) -> tuple[str, str]:
    return server.http, server.grpc


def tiny_server(directory: Path, bias: float) -> Any:
    return serving(make_release(directory / "release", bias=bias) / "models")


class Polite(BaseHTTPRequestHandler):
    """A fake that answers label 0 to every model, and keeps what it was asked."""

    protocol_version = "HTTP/1.1"
    hangs_up = False
    seen: list[dict[str, str]]
    open = 0

    def setup(self) -> None:
        type(self).open += 1
        super().setup()

    def finish(self) -> None:
        super().finish()
        type(self).open -= 1

    def do_POST(self) -> None:
        self.seen.append({name.lower(): value for name, value in self.headers.items()})
        self.rfile.read(int(self.headers["Content-Length"]))
        label = {"name": "label_index", "datatype": "INT64", "shape": [1, 1], "data": [0]}
        body = json.dumps({"model_version": "7", "outputs": [label]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = self.hangs_up

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def polite(hangs_up: bool = False) -> Iterator[tuple[str, type[Polite]]]:
    handler = type("Handler", (Polite,), {"seen": [], "hangs_up": hangs_up})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()
