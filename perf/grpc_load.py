"""Load over gRPC (`perf.closed_loop`): the frames of every request are built beforehand, as no gRPC library lets one do.

Protocol: HTTP/2 without TLS (RFC 9113) with prior knowledge, header fields as HPACK literals that need no table (RFC 7541),
gRPC's messages with five bytes before each (PROTOCOL-HTTP2.md of grpc/grpc), KServe v2's ModelInfer. The server's windows,
frame size and pings are heeded. perf_analyzer, which `perf bench --grpc-load perf_analyzer` takes instead, uses four times as
much CPU time a request, from the same cores.
"""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from perf.closed_loop import RECEIVE_BYTES, Connection, closed_loop
from perf.errors import LoadError
from perf.load import LoadFigures

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM = _ACK = 0x1
_END_HEADERS, _PADDED = 0x4, 0x8
_INITIAL_WINDOW_SIZE = 0x4
_FRAME_HEADER = 9
_FRAME_BYTES = 16384
"""The largest payload that every server takes (SETTINGS_MAX_FRAME_SIZE's least value)."""
_WINDOW = 65535
"""Of a connection and a stream, before the server says otherwise."""
_LARGE_WINDOW = (1 << 31) - 1
_MOST_BUFFERS = 64
"""Of one call of sendmsg; Linux takes 1,024."""
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def infer_message(model: str, tile: bytes, outputs: Sequence[str]) -> bytes:
    """A ModelInferRequest, serialised, that asks a model with the BYTES input `tile` [1, 1] for `outputs`."""
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=model)
    request.inputs.add(name="tile", datatype="BYTES", shape=[1, 1])
    for name in outputs:
        request.outputs.add(name=name)
    request.raw_input_contents.append(struct.pack("<I", len(tile)) + tile)
    return bytes(request.SerializeToString())


def infer_outputs(answer: bytes) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
    """The tensors of an answer to `infer_message`, FP32 and INT64 ones; raises LoadError if it is none."""
    from google.protobuf.message import DecodeError
    from tritonclient.grpc import service_pb2

    try:
        compressed, length = struct.unpack_from(">BI", answer)
        if compressed or length != len(answer) - 5:
            raise ValueError(f"{len(answer)} bytes, compressed {compressed}, length {length}")
        response = service_pb2.ModelInferResponse.FromString(answer[5:])
        return {
            output.name: np.frombuffer(raw, {"FP32": np.float32, "INT64": np.int64}[output.datatype]).reshape(
                output.shape
            )
            for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        }
    except (DecodeError, KeyError, ValueError, struct.error) as error:
        raise LoadError(f"the server's answer is no ModelInferResponse: {error!r}") from error


def grpc_load(
    host: str, port: int, messages: Sequence[bytes], concurrency: int, seconds: float, warm_up_s: float = 0.5
) -> tuple[LoadFigures, list[tuple[int, bytes]]]:
    """A closed loop over gRPC; returns what was seen, and (index of the message, answer) of all.

    Args:
        host, port: of Triton's gRPC endpoint.
        messages: whole messages (`infer_message`), sent in turns.
        concurrency: connections, each with one request in flight.
        seconds, warm_up_s: see `perf.closed_loop.closed_loop`.

    Raises:
        LoadError: no connection, a broken one, an error for an answer, or silence.
    """
    fields = request_fields(f"{host}:{port}")
    requests = [_Frames(fields, message) for message in messages]
    return closed_loop(
        lambda: _Connection(host, port, requests), len(requests), concurrency, seconds, warm_up_s
    )


class _Frames:
    """One request as it is sent: HEADERS, then DATA frames with the message.

    All connections send the same bytes of the payloads. A copy of all tiles for each of them would be 30 MB that pass through
    the caches which the server works in.

    Attributes:
        payloads: of the frames.
        taken: what each frame takes from the windows, bytes.
    """

    def __init__(self, fields: bytes, message: bytes) -> None:
        data = memoryview(struct.pack(">BI", 0, len(message)) + message)
        starts = range(0, len(data), _FRAME_BYTES)
        self.payloads = [memoryview(fields), *(data[at : at + _FRAME_BYTES] for at in starts)]
        self.taken = [0, *map(len, self.payloads[1:])]
        flags = [
            (_HEADERS, _END_HEADERS),
            *((_DATA, _END_STREAM if at == starts[-1] else 0) for at in starts),
        ]
        self._heads = [
            _head(*kind_and_flags, len(payload))
            for kind_and_flags, payload in zip(flags, self.payloads, strict=True)
        ]

    def heads(self, stream: int) -> list[bytes]:
        """What stands before each payload."""
        number = struct.pack(">I", stream)
        return [head + number for head in self._heads]


class _Connection(Connection):
    def __init__(self, host: str, port: int, requests: Sequence[_Frames]) -> None:
        super().__init__(host, port)
        self.requests = requests
        self.current = requests[0]
        self.heads: list[bytes] = []
        settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, _LARGE_WINDOW)
        window = struct.pack(">I", _LARGE_WINDOW - _WINDOW)
        first = _PREFACE + frame(_SETTINGS, 0, 0, settings) + frame(_WINDOW_UPDATE, 0, 0, window)
        # What is put behind it at once begins and ends with a frame.
        self.unsent: deque[bytes | memoryview] = deque([first])
        self.stream = -1
        self.received, self.answer = bytearray(), bytearray()
        self.window = _WINDOW  # of the connection
        self.initial_window = self.stream_window = _WINDOW
        self.next_frame = 0  # frames of `current` that the windows had room for

    def begin(self, index: int) -> None:
        self.stream += 2
        self.current = self.requests[index]
        self.heads = self.current.heads(self.stream)
        self.answer = bytearray()
        self.stream_window = self.initial_window
        self.next_frame = 0
        self._let_out()
        self.continue_sending()

    @property
    def blocked(self) -> bool:
        return bool(self.unsent)

    def _let_out(self) -> None:
        """Put the frames of the request that the windows have room for behind what is to be sent."""
        while self.next_frame < len(self.heads):
            taken = self.current.taken[self.next_frame]
            if taken > min(self.window, self.stream_window):
                break
            self.window -= taken
            self.stream_window -= taken
            self.unsent += (self.heads[self.next_frame], self.current.payloads[self.next_frame])
            self.next_frame += 1

    def continue_sending(self) -> None:
        unsent = self.unsent
        with contextlib.suppress(BlockingIOError):
            while unsent:
                sent = self.socket.sendmsg(tuple(itertools.islice(unsent, _MOST_BUFFERS)))
                while unsent and sent >= len(unsent[0]):
                    sent -= len(unsent.popleft())
                if sent:
                    unsent[0] = memoryview(unsent[0])[sent:]

    def receive(self) -> bytes | None:
        chunk = self.socket.recv(RECEIVE_BYTES)
        if not chunk:
            raise LoadError("the server closed a connection in the middle of the load")
        self.received += chunk
        at, ended = 0, False
        while len(self.received) - at >= _FRAME_HEADER:
            high, low, kind, flags, stream = struct.unpack_from(">BHBBI", self.received, at)
            end = at + _FRAME_HEADER + (high << 16 | low)
            if len(self.received) < end:
                break
            self._take(kind, flags, stream, bytes(self.received[at + _FRAME_HEADER : end]))
            ended |= bool(kind in (_DATA, _HEADERS) and flags & _END_STREAM and stream == self.stream)
            at = end
        del self.received[:at]
        self._let_out()
        self.continue_sending()
        if ended and not self.answer:
            raise LoadError(
                "the server answered a request with an error; ask it once with a client to see which"
            )
        return bytes(self.answer) if ended else None

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _DATA and stream == self.stream:
            if flags & _PADDED:
                payload = payload[1 : len(payload) - payload[0]]
            self.answer += payload
        elif kind == _WINDOW_UPDATE and stream == 0:
            self.window += struct.unpack(">I", payload)[0]
        elif kind == _WINDOW_UPDATE and stream == self.stream:
            self.stream_window += struct.unpack(">I", payload)[0]
        elif kind == _SETTINGS and not flags & _ACK:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == _INITIAL_WINDOW_SIZE:
                    self.stream_window += value - self.initial_window
                    self.initial_window = value
            self.unsent.append(frame(_SETTINGS, _ACK, 0))
        elif kind == _PING and not flags & _ACK:
            self.unsent.append(frame(_PING, _ACK, 0, payload))
        elif kind == _GOAWAY or (kind == _RST_STREAM and stream == self.stream):
            raise LoadError(f"the server ended a connection in the middle of the load (HTTP/2 frame {kind})")


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """An HTTP/2 frame."""
    return _head(kind, flags, len(payload)) + struct.pack(">I", stream) + payload


def _head(kind: int, flags: int, length: int) -> bytes:
    """What stands before a frame's payload of so many bytes, but for its last field, the stream's number."""
    return struct.pack(">BHBB", length >> 16, length & 0xFFFF, kind, flags)


def request_fields(authority: str) -> bytes:
    """Header block of a call of ModelInfer."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/inference.GRPCInferenceService/ModelInfer",
        ":authority": authority,
        "content-type": "application/grpc",
        "te": "trailers",
    }
    return b"".join(_literal(name) + _literal(value, first=b"") for name, value in fields.items())


def _literal(text: str, first: bytes = b"\0") -> bytes:
    """A string of a literal header field that no table remembers; shorter than 127 bytes, not Huffman-coded."""
    return first + bytes([len(text)]) + text.encode()
