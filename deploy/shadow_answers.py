"""What a server answers to a mirrored request, over REST or gRPC, and how the answers of two servers differ.

Sources: the KServe v2 protocol with Triton's binary tensor data extension (triton-inference-server/server, docs/protocol).
"""

from __future__ import annotations

import http.client
import json
import math
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

GRPC_PATH = "/inference.GRPCInferenceService/ModelInfer"
_FRAME_HEAD_BYTES = (
    5  # compressed flag, length of the message as uint32 (gRPC over HTTP/2, "Length-Prefixed-Message")
)
TIMEOUT_S = 30.0
ABSTAINED = "abstained"
_REST_PATH = re.compile(r"/v2/models/([A-Za-z0-9_][A-Za-z0-9_.-]{0,127})(?:/versions/[0-9]{1,9})?/infer")
_MOST_ERROR_CHARACTERS = 300
_MOST_LOG_BYTES = 16_000_000
# Outputs that are compared, where an answer has them in these types: a classification (`class_count`) is BYTES.
_COMPARED: dict[str, tuple[str, type[np.generic]]] = {
    "probabilities": ("FP32", np.float32),
    "label_index": ("INT64", np.int64),
    "answered": ("BOOL", np.bool_),
}
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 2000),  # else a server that was away is found again after two minutes
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]

Label = int | str


class NoAnswer(Exception):
    """A server refused the request, gave none in time, or nothing that is one; in plain words."""

    def __init__(self, message: str) -> None:
        super().__init__(message[:_MOST_ERROR_CHARACTERS])


@dataclass(frozen=True)
class Question:
    """A mirrored request as the client sent it.

    Attributes:
        path: of REST, or GRPC_PATH.
        body: of REST, or the message of gRPC without its frame.
        headers: those that say how to read the body of REST; no others are passed on.
        request_id: of the gateway, "" without one.
    """

    path: str
    body: bytes | bytearray
    headers: Mapping[str, str] = field(default_factory=dict)
    request_id: str = ""

    @property
    def protocol(self) -> str:
        """`http` or `grpc`."""
        return "grpc" if self.path == GRPC_PATH else "http"

    def model(self) -> str:
        """Name of the model that is asked for; "" if the message of gRPC cannot be read."""
        if self.protocol == "grpc":
            try:
                return str(service_pb2.ModelInferRequest.FromString(bytes(self.body)).model_name)
            except DecodeError:
                return ""
        found = _REST_PATH.fullmatch(self.path)
        return found[1] if found else ""


def is_inference(path: str) -> bool:
    """Whether requests to this path are taken."""
    return path == GRPC_PATH or _REST_PATH.fullmatch(path) is not None


def unframed(body: bytes | bytearray) -> bytes | None:
    """The message in a frame of gRPC; None where this is not the frame of one message that is not compressed."""
    if body[:1] != b"\0" or int.from_bytes(body[1:_FRAME_HEAD_BYTES], "big") != len(body) - _FRAME_HEAD_BYTES:
        return None
    return bytes(memoryview(body)[_FRAME_HEAD_BYTES:])


@dataclass(frozen=True)
class Answer:
    """What a server answered.

    Attributes:
        version: of the model, as the server says.
        tensors: those of `probabilities` FP32 [N, K] or [K], `label_index` INT64 [N, 1] or [1], `answered` BOOL [1] that are there.
        duration_s: from the question to the end of the answer.
    """

    version: str
    tensors: Mapping[str, NDArray[Any]]
    duration_s: float = 0.0

    def labels(self) -> list[Label]:
        """Of each row; ABSTAINED where the model says that it does not answer."""
        if "label_index" in self.tensors:
            indices = self.tensors["label_index"].reshape(-1)
        elif "probabilities" in self.tensors:
            indices = np.atleast_1d(self.tensors["probabilities"].argmax(axis=-1))
        else:
            return []
        answered = self.tensors.get("answered", np.ones(1, bool)).reshape(-1)
        return [
            int(index) if given else ABSTAINED
            for index, given in zip(indices, np.broadcast_to(answered, indices.shape), strict=True)
        ]

    def rounded(self) -> list[Any]:
        """Probabilities to six digits; null, for JSON, where one is no number."""
        return _rounded(self.tensors.get("probabilities", np.zeros(0)).tolist())


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 6) if math.isfinite(value) else None


class Server:
    """One tritonserver, asked over connections that stay open; not for several threads at once."""

    def __init__(self, http_address: str, grpc_address: str, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._http = http.client.HTTPConnection(http_address, timeout=timeout_s)
        self._channel = grpc.insecure_channel(grpc_address, options=_CHANNEL)
        self._infer = self._channel.unary_unary(
            GRPC_PATH, response_deserializer=service_pb2.ModelInferResponse.FromString
        )

    def ask(self, question: Question) -> Answer:
        """Raises NoAnswer."""
        started_s = time.monotonic()
        try:
            said = self._grpc(question) if question.protocol == "grpc" else self._rest(question)
        except grpc.RpcError as error:
            raise NoAnswer(f"{error.code().name}: {error.details()}") from error
        except (OSError, http.client.HTTPException) as error:
            self.idle()
            raise NoAnswer(f"no answer: {error or type(error).__name__}") from error
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            self.idle()
            raise NoAnswer(f"the answer cannot be read: {error!r}") from error
        return Answer(*said, time.monotonic() - started_s)

    def idle(self) -> None:
        """Close the connection of REST until the next question: Triton's graceful stop waits for open ones."""
        self._http.close()

    def cancel(self) -> None:
        """From any thread: no more calls of gRPC; one that waits ends."""
        self._channel.close()

    def _rest(self, question: Question) -> tuple[str, dict[str, NDArray[Any]]]:
        kept_open = self._http.sock is not None
        try:
            response = self._send(question)
        except ConnectionError:
            self._http.close()
            if not kept_open:
                raise
            response = self._send(question)  # the server had closed it meanwhile
        body = response.read()
        if response.status != 200:
            raise NoAnswer(
                f"HTTP {response.status}: {body[:_MOST_ERROR_CHARACTERS].decode(errors='replace')}"
            )
        length = response.getheader("Inference-Header-Content-Length")
        return _read_rest(body, len(body) if length is None else int(length))

    def _send(self, question: Question) -> http.client.HTTPResponse:
        self._http.request("POST", question.path, question.body, dict(question.headers))
        return self._http.getresponse()

    def _grpc(self, question: Question) -> tuple[str, dict[str, NDArray[Any]]]:
        response = self._infer(bytes(question.body), timeout=self._timeout_s)
        tensors = {}
        for number, output in enumerate(response.outputs):
            dtype = _compared_type(output.name, output.datatype)
            if dtype is not None:
                data = np.frombuffer(response.raw_output_contents[number], dtype)
                tensors[output.name] = data.reshape(list(output.shape))
        return response.model_version, tensors


def _read_rest(body: bytes, head_bytes: int) -> tuple[str, dict[str, NDArray[Any]]]:
    head = json.loads(body[:head_bytes])
    tensors, at = {}, head_bytes
    for output in head["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        dtype = _compared_type(output["name"], output["datatype"])
        if dtype is not None:
            data = (
                np.array(output["data"], dtype)
                if size is None
                else np.frombuffer(body[at : at + size], dtype)
            )
            tensors[output["name"]] = data.reshape(output["shape"])
        at += size or 0
    return str(head.get("model_version", "")), tensors


def _compared_type(name: str, datatype: str) -> type[np.generic] | None:
    wanted, dtype = _COMPARED.get(name, ("", None))
    return dtype if datatype == wanted else None


@dataclass(frozen=True)
class Comparison:
    """How two answers differ.

    Attributes:
        result: `same_label`, `other_label`, `shape_differs`, or `not_compared` where there is nothing to compare.
        changes: (stable label, candidate label) of each row that has another one.
        difference: the largest between probabilities, 0..1; 1 also where one is no number. None without probabilities.
    """

    result: str
    changes: tuple[tuple[Label, Label], ...] = ()
    difference: float | None = None


def compare(stable: Answer, candidate: Answer) -> Comparison:
    """Labels are `label_index`, or where the largest probability stands if only those were asked for."""
    if not {"probabilities", "label_index"} & {*stable.tensors, *candidate.tensors}:
        return Comparison("not_compared")
    if _shapes(stable) != _shapes(candidate):
        return Comparison("shape_differs")
    changes = tuple(
        (one, other) for one, other in zip(stable.labels(), candidate.labels(), strict=True) if one != other
    )
    difference = None
    if "probabilities" in stable.tensors:
        gaps = np.abs(stable.tensors["probabilities"] - candidate.tensors["probabilities"])
        difference = float(np.nan_to_num(gaps, nan=1.0, posinf=1.0).max(initial=0.0))
    return Comparison("other_label" if changes else "same_label", changes, difference)


def _shapes(answer: Answer) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in answer.tensors.items()}


class DifferenceLog:
    """JSON lines on requests, at most 16 MB of them, and as many in one older part, NAME.1. Safe for several threads."""

    def __init__(self, path: Path, most_bytes: int = _MOST_LOG_BYTES) -> None:
        """Raises OSError if the file cannot be written."""
        self._path, self._most_bytes = path, most_bytes
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()

    def write(
        self, question: Question, compared: Comparison, answers: Mapping[str, Answer], error: str
    ) -> None:
        """One line, which has nothing of what was asked. Raises OSError."""
        told: dict[str, Any] = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "request_id": question.request_id,
            "model": question.model(),
            "protocol": question.protocol,
            "result": compared.result,
            "versions": {side: answer.version for side, answer in answers.items()},
            "labels": {side: answer.labels() for side, answer in answers.items()},
            "probabilities": {side: answer.rounded() for side, answer in answers.items()},
        }
        if compared.difference is not None:
            told["difference"] = round(compared.difference, 6)
        if error:
            told["error"] = error
        line = f"{json.dumps(told)}\n".encode()
        with self._lock:
            if self._path.exists() and self._path.stat().st_size + len(line) > self._most_bytes:
                self._path.replace(self._path.with_name(f"{self._path.name}.1"))
            with self._path.open("ab") as file:
                file.write(line)
