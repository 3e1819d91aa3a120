"""A real tritonserver with a tiny classifier, and a real gateway before it, for the tests of a module."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deploy import certificates
from deploy.benchmarks.guarded import free_port, running
from deploy.gateway import GatewaySettings
from deploy.keys import KeyStore, Limits
from serving.benchmarks.tiny_release import make_release, tiles

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin") is None, reason="nginx is not installed"
)
INFER = "/v2/models/tile_classifier/infer"
OUTPUTS = ("probabilities", "confidence", "label_index")


@dataclass(frozen=True)
class Answer:
    """Of one exchange. `status` 0: the connection was closed without an answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        """What the JSON of an error says."""
        return str(json.loads(self.body)["error"])


@dataclass
class Stack:
    """A gateway that runs; `keys` by the name of their client."""

    state: Path
    settings: GatewaySettings
    server: dict[str, Any]
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def conf(self) -> Path:
        return self.settings.directory / "nginx.conf"

    @property
    def store(self) -> KeyStore:
        return KeyStore(self.state / "keys")

    @property
    def ca(self) -> Path:
        return self.state / "tls" / "ca.pem"

    @property
    def authority(self) -> str:
        return f"localhost:{self.settings.listen_port}"

    def connect(self) -> ssl.SSLSocket:
        """A TLS connection for HTTP/1.1."""
        context = ssl.create_default_context(cafile=str(self.ca))
        raw = socket.create_connection(("127.0.0.1", self.settings.listen_port), timeout=20)
        return context.wrap_socket(raw, server_hostname="localhost")

    def exchange(self, request: bytes) -> Answer:
        """Send these bytes and read one answer, as they are."""
        with self.connect() as connection:
            connection.sendall(request)
            return read_answer(connection)

    def ask(
        self, path: str, *, key: str | None = None, method: str = "GET", body: bytes = b"", headers: str = ""
    ) -> Answer:
        """One request; `key` in `X-API-Key`, `headers` as lines that end in CRLF."""
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}"
        head += f"X-API-Key: {key}\r\n" if key else ""
        head += f"Content-Length: {len(body)}\r\n" if body or method == "POST" else ""
        return self.exchange(head.encode() + b"\r\n" + body)

    def infer(self, key: str, tile: bytes) -> Answer:
        """One inference."""
        head, body = infer_body(tile)
        return self.ask(INFER, key=key, method="POST", body=body, headers=head)

    def log(self) -> list[dict[str, str]]:
        """Lines of the access log, once what nginx holds back has been written."""
        time.sleep(2.0)  # nginx writes after a second, on a busy machine somewhat later
        return [json.loads(line) for line in self.log_text().splitlines()]

    def log_text(self) -> str:
        return (self.settings.directory / "access.log").read_text()


def infer_body(tile: bytes) -> tuple[str, bytes]:
    """Header line and body of one inference in Triton's binary extension."""
    tensor = {
        "name": "tile",
        "shape": [1, 1],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": 4 + len(tile)},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    return f"Inference-Header-Content-Length: {len(head)}\r\n", head + struct.pack("<I", len(tile)) + tile


def read_answer(connection: ssl.SSLSocket) -> Answer:
    """One whole answer; status 0 if the connection ends before."""
    data = b""
    try:
        while b"\r\n\r\n" not in data:
            chunk = connection.recv(65536)
            if not chunk:
                return Answer(0, {}, data)
            data += chunk
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        while len(body) < int(headers.get("content-length", "0")):
            body += connection.recv(65536)
    except (ConnectionError, ssl.SSLError):
        return Answer(0, {}, data)
    return Answer(int(first.split()[1]), headers, body)


def jpeg_tiles() -> list[bytes]:
    """Tiles that the tiny classifier takes."""
    return tiles(64)


@contextmanager
def tiny_server(directory: Path, bias: float) -> Iterator[tuple[dict[str, Any], subprocess.Popen[str]]]:
    """A tritonserver of a tiny release: what its launcher says, and the launcher."""
    repository = make_release(directory, bias=bias) / "models"
    up = [sys.executable, "-m", "serving", "up", "--repository", str(repository), "--http-port", "0",
          "--grpc-port", "0", "--metrics-port", "0"]  # fmt: skip
    launcher = subprocess.Popen(up, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert launcher.stdout
        yield json.loads(launcher.stdout.readline()), launcher
    finally:
        launcher.kill()
        launcher.wait()


@contextmanager
def gateway_stack(directory: Path, **settings: Any) -> Iterator[Stack]:
    """Both, until the block ends; clients `lab` and `batch` without a rate, `slow` with one request a second."""
    with tiny_server(directory / "release", -1.0) as (server, _):
        state = directory / "state"
        store = KeyStore(state / "keys")
        keys = {
            "lab": store.add("lab", Limits()),
            "batch": store.add("batch", Limits(client_class="batch")),
            "slow": store.add("slow", Limits(rate_per_s=1, burst=2)),
            "narrow": store.add("narrow", Limits(in_flight=1)),
        }
        files = certificates.make(state / "tls")
        made = GatewaySettings(
            directory=state / "gateway", keys_file=store.prepare(), certificate=files.certificate,
            certificate_key=files.key, listen_port=free_port(), triton_http=server["http"],
            triton_grpc=server["grpc"], health=server["health"].removeprefix("http://"), workers=2, **settings,
        )  # fmt: skip
        with running(made):
            yield Stack(state, made, server, keys)
