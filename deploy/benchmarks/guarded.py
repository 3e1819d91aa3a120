"""A server and a gateway before it, for as long as a measurement takes."""

from __future__ import annotations

import argparse
import json
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploy import certificates
from deploy.errors import DeployError, GatewayError, UsageError
from deploy.gateway import GatewaySettings, check, command, remove_scratch, render
from deploy.keys import KeyStore, Limits
from perf.bench_server import BenchServer, serving
from perf.errors import PerfError
from perf.http_load import infer_request
from perf.process_tree import cpu_s, descendants
from perf.served_work import models_of
from perf.tiles import benchmark_tiles
from serving.ports import HeldPorts

_START_S = 20.0
_STOP_S = 20.0
OUTPUTS = ("probabilities",)


@dataclass(frozen=True)
class Target:
    """Where requests go.

    Attributes:
        host, port: of HTTP.
        grpc: host:port.
        ca: PEM file; None: not encrypted.
        key: API key; None: none.
    """

    host: str
    port: int
    grpc: str
    ca: Path | None = None
    key: str | None = None

    def tls(self) -> ssl.SSLContext | None:
        """For connections; None if they are not encrypted."""
        return ssl.create_default_context(cafile=str(self.ca)) if self.ca else None

    def requests(self, model: str, tiles: list[bytes]) -> list[bytes]:
        """Whole HTTP requests, one a tile."""
        return [self.with_key(infer_request(model, tile, OUTPUTS, "localhost")) for tile in tiles]

    def with_key(self, request: bytes) -> bytes:
        """The request with the key among its headers."""
        if not self.key:
            return request
        first, _, rest = request.partition(b"\r\n")
        return b"%b\r\nX-API-Key: %b\r\n%b" % (first, self.key.encode(), rest)


@dataclass(frozen=True)
class Guarded:
    """A server that is ready, and its gateway.

    Attributes:
        state: directory as of `python -m deploy up`: keys, tls, gateway.
        key: of the client `bench`, which has no limits of its own.
        pid: of nginx's master process.
    """

    server: BenchServer
    state: Path
    settings: GatewaySettings
    key: str
    pid: int

    def cpu_s(self) -> float:
        """CPU seconds that nginx has used so far."""
        return cpu_s(descendants(self.pid))

    @property
    def direct(self) -> Target:
        """tritonserver itself."""
        host, _, port = self.server.http.rpartition(":")
        return Target(host, int(port), self.server.grpc)

    @property
    def guarded(self) -> Target:
        """The gateway."""
        port = self.settings.listen_port
        return Target("127.0.0.1", port, f"localhost:{port}", self.state / "tls" / "ca.pem", self.key)

    @property
    def conf(self) -> Path:
        """Of the gateway."""
        return self.settings.directory / "nginx.conf"

    @property
    def keys(self) -> KeyStore:
        """Of the gateway."""
        return KeyStore(self.state / "keys")

    def for_client(self, limits: Limits, name: str) -> Target:
        """The gateway with the key of a further client; it takes it after the next reload."""
        return replace(self.guarded, key=self.keys.add(name, limits))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every measurement takes."""
    parser.add_argument(
        "--repository", type=Path, required=True, metavar="DIR", help="model repository, or a release"
    )
    parser.add_argument("--model", default="tile_classifier", help="tile classifier (default %(default)s)")
    parser.add_argument(
        "--tile-px", type=int, default=512, metavar="N", help="side of a tile (default %(default)s)"
    )


@contextmanager
def guarded(options: argparse.Namespace, **settings: Any) -> Iterator[Guarded]:
    """Start both; `settings` are those of the gateway.

    Raises:
        DeployError: one did not start.
    """
    if not options.repository.is_dir():
        raise UsageError(f"--repository {options.repository} is no directory.")
    try:
        with (
            tempfile.TemporaryDirectory(prefix="clotline-gateway-") as scratch,
            serving(models_of(options.repository)) as server,
        ):
            state = Path(scratch)
            files = certificates.make(state / "tls")
            store = KeyStore(state / "keys")
            key = store.add("bench", Limits())
            made = GatewaySettings(
                directory=state / "gateway", keys_file=store.prepare(), certificate=files.certificate,
                certificate_key=files.key, listen_port=free_port(), triton_http=server.http, triton_grpc=server.grpc,
                **settings,
            )  # fmt: skip
            with running(made) as nginx:
                yield Guarded(server, state, made, key, nginx.pid)
    except PerfError as error:
        raise DeployError(str(error)) from error


@contextmanager
def running(settings: GatewaySettings) -> Iterator[subprocess.Popen[bytes]]:
    """nginx with these settings, which takes connections, until the block ends.

    Raises:
        GatewayError: nginx does not take the settings, or ends at once.
    """
    conf = render(settings)
    check(conf)
    errors = settings.directory / "error.log"
    with errors.open("ab") as log:
        process = subprocess.Popen(command(conf), stderr=log)
    try:
        give_up_s = time.monotonic() + _START_S
        while not _listens(settings):
            if process.poll() is not None or time.monotonic() > give_up_s:
                raise GatewayError(f"nginx did not start: {errors.read_text()[-500:].strip()}")
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        remove_scratch(settings.directory)


def free_port() -> int:
    """A port of the loopback address where nobody listens just now."""
    with HeldPorts({"gateway": ("127.0.0.1", 0)}) as ports:
        return ports.numbers["gateway"]


def tiles_of(options: argparse.Namespace) -> list[bytes]:
    """The tiles that are measured with."""
    try:
        return benchmark_tiles(16, options.tile_px)
    except PerfError as error:
        raise UsageError(str(error)) from error


def executions(server: BenchServer) -> float:
    """Inferences that Triton has seen so far, answered or failed, of all models together."""
    with urllib.request.urlopen(server.metrics, timeout=10) as answer:  # noqa: S310  # nosec B310  http of our own
        lines = answer.read().decode().splitlines()
    wanted = ("nv_inference_request_success{", "nv_inference_request_failure{")
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(wanted))


def log_of(gateway: Guarded) -> list[dict[str, str]]:
    """Lines of the access log; nginx holds them back for a second."""
    time.sleep(1.5)
    text = (gateway.settings.directory / "access.log").read_text()
    return [json.loads(line) for line in text.splitlines()]


def _listens(settings: GatewaySettings) -> bool:
    try:
        socket.create_connection((settings.listen_host, settings.listen_port), timeout=1).close()
    except OSError:
        return False
    return True
