"""Load over HTTP/1.1, encrypted or not, closed or open: threads with a connection each, requests built beforehand.

The same loop asks the gateway and tritonserver, so that what it costs falls out of a comparison. A connection that the server
closed while no request was under way (nginx at a reload, RFC 9112 section 9.5) is made anew, and the request sent again once;
`Outcome.again` says so.
"""

from __future__ import annotations

import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deploy.benchmarks.guarded import Target
from deploy.errors import DeployError
from perf.load import LoadFigures

_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """Of one request.

    Attributes:
        index: of the request among those given.
        status: of HTTP; 0 if there was no answer.
        due_s: when it was to be sent, by `time.perf_counter`.
        sent_s: when it was sent.
        latency_s: from `due_s` to the whole answer.
        answer: head and body.
        again: it was sent twice, because the server had closed the connection before.
    """

    index: int
    status: int
    due_s: float
    sent_s: float
    latency_s: float
    answer: bytes
    again: bool = False


class Connection:
    """One connection, made when it is needed."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._tls = target.tls()
        self._socket: socket.socket | None = None
        self.made = 0

    def ask(self, request: bytes) -> tuple[int, bytes, bool]:
        """Status, whole answer, and whether the request was sent twice. Raises OSError if there was no answer."""
        used_before = self._socket is not None
        try:
            return (*self._exchange(request), False)
        except _ClosedBefore:
            self.close()
            if not used_before:
                raise
            return (*self._exchange(request), True)
        except OSError:
            self.close()
            raise

    def begin(self, part: bytes) -> None:
        """Send the beginning of a request."""
        self._socket = self._socket or self._connect()
        self._socket.sendall(part)

    def wait(self, timeout_s: float) -> bytes:
        """Status of an answer to what was begun; empty if the connection was closed instead. Raises OSError."""
        if self._socket is None:
            return b""
        self._socket.settimeout(timeout_s)
        return self._socket.recv(65536)[9:12]

    def close(self) -> None:
        """Close it; the next `ask` makes another one."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None

    def _exchange(self, request: bytes) -> tuple[int, bytes]:
        connection = self._socket or self._connect()
        self._socket = connection
        try:
            connection.sendall(request)
            answer = connection.recv(65536)
        except (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            raise _ClosedBefore(str(error)) from error
        if not answer:
            raise _ClosedBefore("closed")
        while (end := answer.find(b"\r\n\r\n")) < 0:
            answer += self._more(connection)
        head = answer[:end].lower()
        at = head.find(b"\r\ncontent-length:")
        length = int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        while len(answer) < end + 4 + length:
            answer += self._more(connection)
        if b"\r\nconnection: close" in head:
            self.close()
        return int(answer[9:12]), answer

    def _more(self, connection: socket.socket) -> bytes:
        chunk = connection.recv(65536)
        if not chunk:
            raise ConnectionError("the answer was cut off")
        return chunk

    def _connect(self) -> socket.socket:
        raw = socket.create_connection((self._target.host, self._target.port), timeout=_TIMEOUT_S)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.made += 1
        return self._tls.wrap_socket(raw, server_hostname="localhost") if self._tls else raw


class _ClosedBefore(ConnectionError):
    """The server had closed the connection; nothing of an answer came."""


def closed_loop(
    target: Target, requests: Sequence[bytes], concurrency: int, seconds: float, warm_up_s: float = 0.5
) -> tuple[LoadFigures, list[Outcome]]:
    """`concurrency` requests in flight for `seconds`; figures of those answered after `warm_up_s`.

    Raises:
        DeployError: a request without an answer, or with another status than 200.
    """
    cpu_from_s = time.process_time()
    end_s = time.perf_counter() + warm_up_s + seconds
    counted_from_s = end_s - seconds

    def client(number: int, found: list[Outcome]) -> None:
        connection = Connection(target)
        turn = number
        while (now_s := time.perf_counter()) < end_s:
            index = turn % len(requests)
            found.append(_ask(connection, requests[index], index, now_s))
            turn += concurrency
        connection.close()

    outcomes = run_clients(client, concurrency)
    wrong = [outcome for outcome in outcomes if outcome.status != 200]
    if wrong:
        raise DeployError(f"{len(wrong)} requests failed: {told(wrong[0])}")
    latencies_ms = [1000 * o.latency_s for o in outcomes if counted_from_s <= o.due_s + o.latency_s <= end_s]
    if not latencies_ms:
        raise DeployError("no request was answered in time; measure longer")
    figures = LoadFigures(
        requests_per_s=len(latencies_ms) / seconds,
        mean_ms=float(np.mean(latencies_ms)),
        p50_ms=float(np.percentile(latencies_ms, 50)),
        p95_ms=float(np.percentile(latencies_ms, 95)),
        load_cpu_s=time.process_time() - cpu_from_s,
    )
    return figures, outcomes


def open_loop(
    target: Target,
    requests: Sequence[bytes],
    rate_per_s: float,
    seconds: float,
    connections: int = 48,
    seed: int = 1,
) -> list[Outcome]:
    """Requests at random times (Poisson), whatever becomes of those before; latency counts from when each was due."""
    generator = random.Random(seed)  # noqa: S311  # nosec B311  no secret
    started_s = time.perf_counter() + 0.1
    due_s, at_s = [], 0.0
    while (at_s := at_s + generator.expovariate(rate_per_s)) < seconds:
        due_s.append(started_s + at_s)
    lock = threading.Lock()
    turns = iter(enumerate(due_s))

    def client(number: int, found: list[Outcome]) -> None:
        connection = Connection(target)
        while True:
            with lock:
                turn = next(turns, None)
            if turn is None:
                break
            index = turn[0] % len(requests)
            time.sleep(max(0.0, turn[1] - time.perf_counter()))
            found.append(_ask(connection, requests[index], index, turn[1]))
        connection.close()

    return sorted(run_clients(client, connections), key=lambda outcome: outcome.due_s)


def run_clients(client: Callable[[int, list[Outcome]], None], count: int) -> list[Outcome]:
    """Run `client(number, outcomes)` in threads; returns the outcomes of all."""
    found: list[list[Outcome]] = [[] for _ in range(count)]
    threads = [
        threading.Thread(target=client, args=(number, found[number]), daemon=True) for number in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcome for each in found for outcome in each]


def told(outcome: Outcome) -> str:
    """An outcome for an error's text."""
    text = outcome.answer.rpartition(b"\r\n\r\n")[2] if outcome.status else outcome.answer
    return f"status {outcome.status}: {text[:200].decode(errors='replace')}"


def _ask(connection: Connection, request: bytes, index: int, due_s: float) -> Outcome:
    sent_s = time.perf_counter()
    again = False
    try:
        status, answer, again = connection.ask(request)
    except OSError as error:
        status, answer = 0, repr(error).encode()
    return Outcome(index, status, due_s, sent_s, time.perf_counter() - due_s, answer, again)
