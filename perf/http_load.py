"""A closed loop over HTTP that costs little: one thread, one epoll, requests that were built beforehand.

Every connection sends its next request as soon as it has the whole answer to the one before. Nothing is parsed while
the clock runs but the length of the answer; the answers are kept, and checked afterwards. Sending a tile of 120 kB costs
the machine about as much as the kernel's copy of it: the figures of `bench` say how much (`load_cpu_s_per_1000`).

Protocol: HTTP/1.1 with keep-alive (RFC 9112), bodies of Triton's binary tensor data extension (a JSON header of
`Inference-Header-Content-Length` bytes, then the tensors; BYTES elements with four bytes of length before each).
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from perf.errors import LoadError
from perf.load import LoadFigures

_RECEIVE_BYTES = 1 << 16
_SEND_BUFFER_BYTES = 1 << 20
_SILENCE_S = 30.0


class _Connection:
    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self.socket.setblocking(False)
        self.unsent = memoryview(b"")
        self.received = bytearray()
        self.wanted = 0  # bytes of the whole answer, 0 while its length is unknown
        self.index = 0
        self.started_s = 0.0


def infer_request(model: str, tile: bytes, outputs: Sequence[str], host: str) -> bytes:
    """One whole HTTP request that asks a model with the BYTES input `tile` [1, 1] for `outputs` in binary."""
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "tile",
                    "datatype": "BYTES",
                    "shape": [1, 1],
                    "parameters": {"binary_data_size": 4 + len(tile)},
                }
            ],
            "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in outputs],
        },
        separators=(",", ":"),
    ).encode()
    head = (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/octet-stream\r\n"
        f"Inference-Header-Content-Length: {len(header)}\r\nContent-Length: {len(header) + 4 + len(tile)}\r\n\r\n"
    ).encode()
    return b"".join((head, header, struct.pack("<I", len(tile)), tile))


def infer_answer(answer: bytes) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
    """The tensors of an answer to `infer_request`, FP32 and INT64 ones.

    Raises:
        LoadError: the server answered with an error, or not by the protocol.
    """
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    if b" 200 " not in lines[0] + b" ":
        raise LoadError(
            f"the server answered {lines[0].decode('latin1')}: {body[:300].decode(errors='replace')}"
        )
    fields = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])
    }
    try:
        length = int(fields[b"inference-header-content-length"])
        tensors, at = {}, length
        for output in json.loads(body[:length])["outputs"]:
            size = output["parameters"]["binary_data_size"]
            kind = {"FP32": np.float32, "INT64": np.int64}[output["datatype"]]
            tensors[output["name"]] = np.frombuffer(body[at : at + size], kind).reshape(output["shape"])
            at += size
    except (KeyError, ValueError) as error:
        raise LoadError(
            f"the server's answer is not of the binary tensor data extension: {error!r}"
        ) from error
    return tensors


def closed_loop(
    host: str, port: int, requests: Sequence[bytes], concurrency: int, seconds: float, warm_up_s: float = 0.5
) -> tuple[LoadFigures, list[tuple[int, bytes]]]:
    """Keep `concurrency` requests in flight; returns what was seen, and (index of the request, answer) of all.

    Args:
        host, port: of Triton's HTTP endpoint.
        requests: whole requests (`infer_request`), sent in turns.
        concurrency: connections, each with one request in flight.
        seconds: how long answers count.
        warm_up_s: before that, answers are kept but do not count.

    Raises:
        LoadError: no connection, a broken one, or silence.
    """
    try:
        connections = [_Connection(host, port) for _ in range(concurrency)]
    except OSError as error:
        raise LoadError(f"no HTTP connection to {host}:{port}: {error}. Is the server up?") from error
    poll = select.epoll()
    try:
        for connection in connections:
            poll.register(connection.socket, select.EPOLLIN)
        return _run(poll, connections, [memoryview(request) for request in requests], seconds, warm_up_s)
    except OSError as error:
        raise LoadError(f"the connection to {host}:{port} broke: {error}") from error
    finally:
        poll.close()
        for connection in connections:
            connection.socket.close()


def _run(
    poll: select.epoll,
    connections: list[_Connection],
    requests: list[memoryview],
    seconds: float,
    warm_up_s: float,
) -> tuple[LoadFigures, list[tuple[int, bytes]]]:
    by_descriptor = {connection.socket.fileno(): connection for connection in connections}
    answers: list[tuple[int, bytes]] = []
    latencies_s: list[float] = []
    sent = 0
    clock = time.perf_counter
    for connection in connections:
        _send(poll, connection, requests, sent, clock())
        sent += 1
    counted_from_s = clock() + warm_up_s
    started_cpu_s = time.process_time()
    counts = False
    while True:
        ready = poll.poll(_SILENCE_S)
        if not ready:
            raise LoadError(f"the server gave no answer for {_SILENCE_S:.0f} s")
        for descriptor, event in ready:
            connection = by_descriptor[descriptor]
            if event & select.EPOLLOUT:
                _send_rest(poll, connection)
            if not event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                continue
            chunk = connection.socket.recv(_RECEIVE_BYTES)
            if not chunk:
                raise LoadError("the server closed a connection in the middle of the load")
            connection.received += chunk
            if not connection.wanted:
                connection.wanted = _length(connection.received)
            if not connection.wanted or len(connection.received) < connection.wanted:
                continue
            now_s = clock()
            if not counts and now_s >= counted_from_s:
                counted_from_s, counts = now_s, True
            elif counts:
                latencies_s.append(now_s - connection.started_s)
                if now_s >= counted_from_s + seconds:
                    latencies_ms = 1000 * np.asarray(latencies_s)
                    load = LoadFigures(
                        requests_per_s=len(latencies_ms) / (now_s - counted_from_s),
                        mean_ms=float(latencies_ms.mean()),
                        p50_ms=float(np.percentile(latencies_ms, 50)),
                        p95_ms=float(np.percentile(latencies_ms, 95)),
                        load_cpu_s=time.process_time() - started_cpu_s,
                    )
                    return load, answers
            answers.append((connection.index, bytes(connection.received)))
            _send(poll, connection, requests, sent, now_s)
            sent += 1


def _send(
    poll: select.epoll, connection: _Connection, requests: list[memoryview], number: int, now_s: float
) -> None:
    connection.index = number % len(requests)
    connection.received = bytearray()
    connection.wanted = 0
    connection.started_s = now_s
    connection.unsent = requests[connection.index]
    done = connection.socket.send(connection.unsent)
    connection.unsent = connection.unsent[done:]
    if connection.unsent:
        poll.modify(connection.socket, select.EPOLLIN | select.EPOLLOUT)


def _send_rest(poll: select.epoll, connection: _Connection) -> None:
    connection.unsent = connection.unsent[connection.socket.send(connection.unsent) :]
    if not connection.unsent:
        poll.modify(connection.socket, select.EPOLLIN)


def _length(received: bytearray) -> int:
    """Bytes of the whole answer, 0 if its head is not complete yet."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return 0
    head = bytes(received[:end]).lower()
    at = head.find(b"\r\ncontent-length:")
    if at < 0:
        raise LoadError("the server's answer has no Content-Length")
    return end + 4 + int(head[at + 17 :].split(b"\r\n", 1)[0])
