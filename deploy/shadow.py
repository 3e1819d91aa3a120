"""A candidate release answers copies of what clients ask, and its answers are held against those of the release that serves.

nginx sends a copy of a sample of the requests here (`mirror`). Each gets 204 as soon as it has been read, since nginx holds
the client's connection until then; a few threads then ask both servers, one after the other: on one machine they would
slow each other down and their durations would say so, and what the serving one refuses need not be asked again.

    clotline_shadow_requests_total{model,result}                    results: RESULTS
    clotline_shadow_dropped_total                                   for want of room
    clotline_shadow_label_changes_total{model,stable,candidate}     rows; labels 0..9, abstained, other
    clotline_shadow_probability_difference{model}                   the largest of a request
    clotline_shadow_duration_seconds{side}                          of answers, not of failures
    clotline_shadow_queue                                           requests that wait

Labels have a bounded number of values: a model is named once the serving release has answered for it, and 50 of them at most.
"""

from __future__ import annotations

import queue
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socket import AF_INET, AF_INET6
from socketserver import ThreadingTCPServer
from typing import Any, ClassVar

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from deploy.access_metrics import BUCKETS_S
from deploy.shadow_answers import (
    GRPC_PATH,
    TIMEOUT_S,
    Answer,
    Comparison,
    DifferenceLog,
    Label,
    NoAnswer,
    Question,
    Server,
    compare,
    is_inference,
    unframed,
)

RESULTS = ("same_label", "other_label", "shape_differs", "candidate_failed", "stable_failed", "not_compared")
BUCKETS_DIFFERENCE = (1e-5, 1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
MIB = 1 << 20
MOST_BODY_BYTES = 64 * MIB
_MOST_MODELS = 50
_PIECE_BYTES = 1 << 18
_IDLE_S = 1.0
_STOP_S = 2.0
_READ_HEADERS = ("Content-Type", "Inference-Header-Content-Length")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class ShadowSettings:
    """What a shadow asks, and how much it holds.

    Attributes:
        stable, candidate: host:port of HTTP and of gRPC, of the server whose answers clients get and of the other one.
        log: file for requests with another label or a failure, one JSON line each.
        workers: threads that ask.
        most_requests, most_bytes: of requests that are read, wait, or are asked; the rest is dropped.
        timeout_s: for an answer.
    """

    stable: tuple[str, str]
    candidate: tuple[str, str]
    log: Path | None = None
    workers: int = 2
    most_requests: int = 64
    most_bytes: int = 128 * MIB
    timeout_s: float = TIMEOUT_S


class Room:
    """Places and bytes for requests, until they have been compared. Safe for several threads."""

    def __init__(self, most_requests: int, most_bytes: int) -> None:
        self._lock = threading.Lock()
        self._requests, self._bytes = most_requests, most_bytes

    def take(self, requests: int, size_bytes: int) -> bool:
        """False, and nothing is taken, if there is not so much."""
        with self._lock:
            if self._requests < requests or self._bytes < size_bytes:
                return False
            self._requests -= requests
            self._bytes -= size_bytes
            return True

    def give_back(self, requests: int, size_bytes: int) -> None:
        """What was taken."""
        with self._lock:
            self._requests += requests
            self._bytes += size_bytes


class Shadow:
    """Asks both servers what it is given, compares, and counts, into a registry of its own; threads of its own, until `close`."""

    def __init__(self, settings: ShadowSettings) -> None:
        """Raises OSError if the log cannot be written."""
        self.room = Room(settings.most_requests, settings.most_bytes)
        self.registry = CollectorRegistry()
        self._log = DifferenceLog(settings.log) if settings.log else None
        self._make_metrics()
        self._known: set[str] = set()
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[Question, int] | None] = queue.SimpleQueue()
        Gauge("clotline_shadow_queue", "Requests that wait.", registry=self.registry).set_function(
            self._waiting.qsize
        )
        self._closing = threading.Event()
        self._servers: list[Server] = []
        self._threads = []
        for _ in range(settings.workers):
            sides = [Server(*where, settings.timeout_s) for where in (settings.stable, settings.candidate)]
            self._servers += sides
            self._threads.append(threading.Thread(target=self._work, args=sides, name="shadow", daemon=True))
        for thread in self._threads:
            thread.start()

    def _make_metrics(self) -> None:
        registry = self.registry
        self._requests = Counter(
            "clotline_shadow_requests", "Mirrored requests, by how the two answers differ.",
            ["model", "result"], registry=registry,
        )  # fmt: skip
        self.dropped = Counter(
            "clotline_shadow_dropped", "Mirrored requests for which there was no room.", registry=registry
        )
        self._changes = Counter(
            "clotline_shadow_label_changes", "Rows that the candidate gives another label.",
            ["model", "stable", "candidate"], registry=registry,
        )  # fmt: skip
        self._difference = Histogram(
            "clotline_shadow_probability_difference", "The largest difference between probabilities of a request.",
            ["model"], buckets=BUCKETS_DIFFERENCE, registry=registry,
        )  # fmt: skip
        self._duration = Histogram(
            "clotline_shadow_duration_seconds", "From a question to its answer.",
            ["side"], buckets=BUCKETS_S, registry=registry,
        )  # fmt: skip
        for side in ("stable", "candidate"):
            self._duration.labels(side)

    def add(self, question: Question, taken_bytes: int) -> None:
        """Let it wait for a thread. One place and so many bytes of `room` are its own, and given back in the end."""
        self._waiting.put((question, taken_bytes))

    def close(self) -> None:
        """Give up what waits, and end the threads; one that waits for an answer over REST ends with the process."""
        self._closing.set()
        for _ in self._threads:
            self._waiting.put(None)
        for server in self._servers:
            server.cancel()
        for thread in self._threads:
            thread.join(_STOP_S / len(self._threads))

    def _work(self, stable: Server, candidate: Server) -> None:
        while not self._closing.is_set():
            try:
                given = self._waiting.get(timeout=_IDLE_S)
            except queue.Empty:
                stable.idle()
                candidate.idle()
                continue
            if given is None:
                return
            question, taken_bytes = given
            try:
                self._ask_both(question, stable, candidate)
            except Exception as error:  # one request must not end the thread that all others wait for
                _say(f"trouble with a request: {error!r}")
            finally:
                self.room.give_back(1, taken_bytes)

    def _ask_both(self, question: Question, stable: Server, candidate: Server) -> None:
        answers: dict[str, Answer] = {}
        compared, error = Comparison("stable_failed"), ""
        try:
            answers["stable"] = stable.ask(question)
            compared = Comparison("candidate_failed")
            answers["candidate"] = candidate.ask(question)
            compared = compare(answers["stable"], answers["candidate"])
        except NoAnswer as failure:
            error = str(failure)
        if self._closing.is_set():
            return  # the connections were closed under it
        label = self._model_label(question.model(), bool(answers))
        for side, answer in answers.items():
            self._duration.labels(side).observe(answer.duration_s)
        for one, other in compared.changes:
            self._changes.labels(label, _label(one), _label(other)).inc()
        if compared.difference is not None:
            self._difference.labels(label).observe(compared.difference)
        if self._log and compared.result not in ("same_label", "not_compared"):
            try:
                self._log.write(question, compared, answers, error)
            except OSError as trouble:  # a full disk; what is counted goes on
                _say(f"--log cannot be written: {trouble}")
        self._requests.labels(label, compared.result).inc()  # last: all else is told by then

    def _model_label(self, model: str, answered: bool) -> str:
        with self._lock:
            if answered and len(self._known) < _MOST_MODELS:
                self._known.add(model)
            return model if model in self._known else "other"


def _say(text: str) -> None:
    print(f"shadow: {text}", file=sys.stderr, flush=True)


def _label(label: Label) -> str:
    return str(label) if isinstance(label, str) or 0 <= label <= 9 else "other"


class _TooLarge(Exception):
    """A body of more than MOST_BODY_BYTES."""


class _Handler(BaseHTTPRequestHandler):
    shadow: ClassVar[Shadow]
    protocol_version = "HTTP/1.1"
    server_version = "clotline"
    sys_version = ""
    timeout = 30.0

    def do_POST(self) -> None:
        """Take a copy of a request."""
        if not is_inference(self.path):
            self._answer(404, close=True)
            return
        try:
            read = self._read()
        except _TooLarge:
            self._answer(413, close=True)
        except ValueError:
            self._answer(400, close=True)
        else:
            self._answer(204 if read else 400)

    def do_GET(self) -> None:
        """`/metrics` or `/health`."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, generate_latest(self.shadow.registry), CONTENT_TYPE_LATEST)
        elif path == "/health":
            self._answer(200, b'{"status":"up"}\n', "application/json")
        else:
            self._answer(404, close=True)

    def _nothing(self) -> None:
        self._answer(404, close=True)

    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _nothing

    def _read(self) -> bool:
        """Read the body and hand it on, or drop it where there is no room; False if it is no frame of gRPC and should be.

        Raises ValueError or _TooLarge for a body that is not read to its end, OSError for a broken connection.
        """
        room = self.shadow.room
        body = bytearray()
        kept = room.take(1, 0)
        try:
            for piece in self._pieces():
                if kept and room.take(0, len(piece)):
                    body += piece
                elif kept:
                    kept = False
                    room.give_back(1, len(body))
                    body.clear()
            if not kept:
                self.shadow.dropped.inc()
                return True
            taken_bytes = len(body)
            content = unframed(body) if self.path == GRPC_PATH else body
            if content is None:
                return False
            headers = {name: self.headers[name] for name in _READ_HEADERS if name in self.headers}
            request_id = self.headers.get("X-Request-ID", "")
            if not _REQUEST_ID.fullmatch(request_id):
                request_id = ""
            self.shadow.add(Question(self.path, content, headers, request_id), taken_bytes)
            kept = False
            return True
        finally:
            if kept:
                room.give_back(1, len(body))

    def _pieces(self) -> Iterator[bytes]:
        """The body, as it comes."""
        length, coding = self.headers.get("Content-Length"), self.headers.get("Transfer-Encoding")
        if coding is None:
            yield from self._exactly(_number(length or "0", 10))
            return
        if coding.lower() != "chunked" or length is not None:
            raise ValueError("a body of unknown length")
        total = 0
        while size := _number(self.rfile.readline(1024).partition(b";")[0].strip().decode("latin1"), 16):
            total += size
            if total > MOST_BODY_BYTES:
                raise _TooLarge
            yield from self._exactly(size)
            if self.rfile.read(2) != b"\r\n":
                raise ValueError("a chunk that does not end where it should")
        for _ in range(100):
            if self.rfile.readline(8192) in (b"\r\n", b"\n"):
                return
        raise ValueError("too many trailers")

    def _exactly(self, size_bytes: int) -> Iterator[bytes]:
        if size_bytes > MOST_BODY_BYTES:
            raise _TooLarge
        while size_bytes:
            piece = self.rfile.read(min(size_bytes, _PIECE_BYTES))
            if not piece:
                raise ConnectionError("the connection ended within a body")
            size_bytes -= len(piece)
            yield piece

    def _answer(
        self, status: int, content: bytes = b"", content_type: str = "", *, close: bool = False
    ) -> None:
        self.close_connection = self.close_connection or close
        self.send_response(status)
        if content_type:
            self.send_header("Content-Type", content_type)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """The gateway has logged the request."""


def _number(text: str, base: int) -> int:
    if not re.fullmatch("[0-9]{1,15}" if base == 10 else "[0-9A-Fa-f]{1,12}", text):
        raise ValueError(f"{text!r} is no length")
    return int(text, base)


class ShadowServer(ThreadingTCPServer):
    """The port that nginx and Prometheus ask; port 0 takes a free one. Raises OSError if the address cannot be used."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, shadow: Shadow, host: str, port: int) -> None:
        class Handler(_Handler):
            pass

        Handler.shadow = shadow
        self.address_family = AF_INET6 if ":" in host else AF_INET
        super().__init__((host, port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is nobody's fault; other errors would be ours."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            _say(f"a connection was given up: {error!r}")
