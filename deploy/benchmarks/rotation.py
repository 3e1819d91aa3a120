"""python -m deploy.benchmarks rotation --repository runs/perf/resnet18

Keys and certificates changed under load: in each cycle the clients' key is rotated (they move to the new one within its grace),
another client is added and revoked, and the certificate is renewed; each is followed by a reload. Clients ask without a pause
over HTTP and gRPC, without retries of their own.

Bar: 0 failed requests. An HTTP/1.1 connection that nginx closes between two requests, as any server may, is made anew and
the request sent again (`sent_again`); gRPC does that by itself. Exit code 1 if a request failed, a revoked key still worked,
or the old certificate was still served.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import threading
import time
from typing import Any

import numpy as np
from cryptography import x509

from deploy import certificates
from deploy.benchmarks.guarded import Guarded, guarded, tiles_of
from deploy.benchmarks.guarded import add_arguments as add_shared
from deploy.benchmarks.load import Connection
from deploy.errors import UsageError
from deploy.gateway import reload
from deploy.keys import Limits
from perf.http_load import infer_request

_GRACE_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `rotation`."""
    add_shared(parser)
    parser.add_argument("--times", type=int, default=10, metavar="N", help="cycles (default %(default)s)")
    parser.add_argument(
        "--clients", type=int, default=4, metavar="N", help="of each protocol (default %(default)s)"
    )
    parser.add_argument(
        "--pause-s", type=float, default=0.5, metavar="S", help="between changes (default %(default)s)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`rotation`; raises DeployError."""
    if options.times < 1 or options.clients < 1 or options.pause_s < 0:
        raise UsageError("--times and --clients must be 1 or more, --pause-s 0 or more.")
    tiles = tiles_of(options)
    with guarded(options, in_flight=4 * options.clients) as both:
        load = _Load(both, options.model, tiles)
        threads = [
            threading.Thread(target=ask, daemon=True)
            for ask in (load.http, load.grpc)
            for _ in range(options.clients)
        ]
        for thread in threads:
            thread.start()
        reload_s: list[float] = []
        wrong: list[str] = []
        for number in range(options.times):
            reload_s += _cycle(both, load, number, options.pause_s, wrong)
        load.stop.set()
        for thread in threads:
            thread.join()
    passed = not load.failed and not wrong and load.answered > 0
    return {
        "passed": passed,
        "answered": load.answered,
        "failed": len(load.failed),
        "sent_again": load.sent_again,
        "cycles": options.times,
        "reloads": len(reload_s),
        "reload_median_s": round(statistics.median(reload_s), 3),
        "wrong": wrong[:5],
        "first_failures": load.failed[:5],
        "exit_code": 0 if passed else 1,
    }


class _Load:
    """Clients that ask with the key of the moment."""

    def __init__(self, both: Guarded, model: str, tiles: list[bytes]) -> None:
        self._target, self._model, self._tiles = both.guarded, model, tiles
        self.key = both.key
        self.stop = threading.Event()
        self.failed: list[str] = []
        self.answered = self.sent_again = 0
        self._lock = threading.Lock()

    def http(self) -> None:
        """A client over HTTP, until `stop`."""
        connection = Connection(self._target)
        plain = infer_request(self._model, self._tiles[0], ("probabilities",), "localhost")
        first, _, rest = plain.partition(b"\r\n")
        while not self.stop.is_set():
            request = b"%b\r\nX-API-Key: %b\r\n%b" % (first, self.key.encode(), rest)
            try:
                status, answer, again = connection.ask(request)
                problem = "" if status == 200 else f"HTTP {status}: {answer[-200:].decode(errors='replace')}"
            except OSError as error:
                problem, again = f"HTTP: {error!r}", False
            self._count(problem, again)
        connection.close()

    def grpc(self) -> None:
        """A client over gRPC, until `stop`."""
        import tritonclient.grpc as triton
        from tritonclient.utils import InferenceServerException

        client = triton.InferenceServerClient(
            self._target.grpc, ssl=True, root_certificates=str(self._target.ca),
            channel_args=[("grpc.use_local_subchannel_pool", 1)],
        )  # fmt: skip
        tensor = triton.InferInput("tile", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[self._tiles[0]]], dtype=object))
        while not self.stop.is_set():
            problem = ""
            try:
                client.infer(self._model, [tensor], headers={"x-api-key": self.key}, client_timeout=60)
            except InferenceServerException as error:
                problem = f"gRPC {error.status()}: {error.message()}"
            self._count(problem, False)
        client.close()

    def _count(self, problem: str, again: bool) -> None:
        with self._lock:
            self.sent_again += again
            if problem:
                self.failed.append(problem)
            else:
                self.answered += 1


def _cycle(both: Guarded, load: _Load, number: int, pause_s: float, wrong: list[str]) -> list[float]:
    """All changes once; seconds of each reload."""
    took_s = []

    def change() -> None:
        started_s = time.monotonic()
        reload(both.conf)
        took_s.append(time.monotonic() - started_s)
        time.sleep(pause_s)

    new = both.keys.rotate("bench", _GRACE_S)
    change()
    load.key = new
    guest = both.for_client(Limits(), f"guest-{number}")
    change()
    ask = b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nX-API-Key: %b\r\n\r\n" % (guest.key or "").encode()
    for revoked, expected in ((False, 200), (True, 401)):
        if revoked:
            both.keys.revoke(f"guest-{number}")
            change()
        status, answer, _ = Connection(guest).ask(ask)
        if status != expected:
            wrong.append(f"cycle {number}: {status} instead of {expected}: {answer[-100:]!r}")
    files = certificates.renew(both.state / "tls")
    change()
    if _served(both) != x509.load_pem_x509_certificate(files.certificate.read_bytes()).serial_number:
        wrong.append(f"cycle {number}: the old certificate is still served")
    return took_s


def _served(both: Guarded) -> int:
    """Serial number of the certificate that a new connection gets."""
    target = both.guarded
    context = target.tls()
    assert context  # noqa: S101  the gateway's connections are encrypted
    with (
        socket.create_connection((target.host, target.port), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as connection,
    ):
        shown = connection.getpeercert(binary_form=True)
    return x509.load_der_x509_certificate(shown or b"").serial_number
