"""Load over HTTP (`perf.closed_loop`): whole requests that were built beforehand, and the length of every answer.

Protocol: HTTP/1.1 with keep-alive (RFC 9112), bodies of Triton's binary tensor data extension (a JSON header of
`Inference-Header-Content-Length` bytes, then the tensors; BYTES elements with four bytes of length before each).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from perf.closed_loop import RECEIVE_BYTES, Connection, closed_loop
from perf.errors import LoadError
from perf.load import LoadFigures


class _Connection(Connection):
    def __init__(self, host: str, port: int, requests: Sequence[memoryview]) -> None:
        super().__init__(host, port)
        self.requests = requests
        self.unsent = memoryview(b"")
        self.received = bytearray()
        self.wanted = 0  # bytes of the whole answer, 0 while its length is unknown

    def begin(self, index: int) -> None:
        self.received, self.wanted = bytearray(), 0
        self.unsent = self.requests[index]
        self.continue_sending()

    def continue_sending(self) -> None:
        self.unsent = self.unsent[self.socket.send(self.unsent) :]

    @property
    def blocked(self) -> bool:
        return bool(self.unsent)

    def receive(self) -> bytes | None:
        chunk = self.socket.recv(RECEIVE_BYTES)
        if not chunk:
            raise LoadError("the server closed a connection in the middle of the load")
        self.received += chunk
        if not self.wanted:
            self.wanted = _length(self.received)
        whole = self.wanted and len(self.received) >= self.wanted
        return bytes(self.received) if whole else None


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


def http_load(
    host: str, port: int, requests: Sequence[bytes], concurrency: int, seconds: float, warm_up_s: float = 0.5
) -> tuple[LoadFigures, list[tuple[int, bytes]]]:
    """A closed loop over HTTP; returns what was seen, and (index of the request, answer) of all.

    Args:
        host, port: of Triton's HTTP endpoint.
        requests: whole requests (`infer_request`), sent in turns.
        concurrency: connections, each with one request in flight.
        seconds, warm_up_s: see `perf.closed_loop.closed_loop`.

    Raises:
        LoadError: no connection, a broken one, or silence.
    """
    views = [memoryview(request) for request in requests]
    return closed_loop(lambda: _Connection(host, port, views), len(views), concurrency, seconds, warm_up_s)


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
