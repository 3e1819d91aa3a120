"""The bytes that are sent, and those that are understood."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from perf.errors import LoadError
from perf.http_load import infer_answer, infer_request


def test_a_request_is_one_whole_message_of_the_binary_extension() -> None:
    request = infer_request("tile_classifier", b"\xff\xd8tile", ("probabilities",), "127.0.0.1:8000")
    head, _, body = request.partition(b"\r\n\r\n")
    fields = dict(line.split(b": ") for line in head.split(b"\r\n")[1:])
    assert head.startswith(b"POST /v2/models/tile_classifier/infer HTTP/1.1\r\n")
    assert int(fields[b"Content-Length"]) == len(body)
    length = int(fields[b"Inference-Header-Content-Length"])
    header = json.loads(body[:length])
    assert header["inputs"][0]["shape"] == [1, 1]
    assert header["inputs"][0]["parameters"]["binary_data_size"] == len(body) - length
    assert body[length:] == struct.pack("<I", 6) + b"\xff\xd8tile"


def answer(outputs: list[dict[str, object]], tensors: bytes, status: str = "200 OK") -> bytes:
    header = json.dumps({"outputs": outputs}).encode()
    head = f"HTTP/1.1 {status}\r\nInference-Header-Content-Length: {len(header)}\r\nContent-Length: 0\r\n\r\n"
    return head.encode() + header + tensors


def test_tensors_are_read_in_the_order_of_the_answer() -> None:
    outputs = [
        {"name": "label_index", "datatype": "INT64", "shape": [1, 1], "parameters": {"binary_data_size": 8}},
        {"name": "probabilities", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}},
    ]
    tensors = np.int64(1).tobytes() + np.asarray([0.25, 0.75], np.float32).tobytes()
    got = infer_answer(answer(outputs, tensors))
    assert got["label_index"].tolist() == [[1]]
    assert got["probabilities"].tolist() == [[0.25, 0.75]]


@pytest.mark.parametrize(
    "wrong",
    [
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        answer(
            [{"name": "p", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}],
            b"1234",
        ),
        answer(
            [{"name": "p", "datatype": "BF16", "shape": [1], "parameters": {"binary_data_size": 2}}], b"12"
        ),
    ],
)
def test_anything_else_is_an_error(wrong: bytes) -> None:
    with pytest.raises(LoadError):
        infer_answer(wrong)
