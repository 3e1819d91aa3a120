"""Our side of HTTP/2 against gRPC's own server."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from perf.errors import LoadError
from perf.grpc_load import grpc_load, infer_message, infer_outputs


@contextmanager
def answering(answer: Callable[[bytes, grpc.ServicerContext], bytes]) -> Iterator[int]:
    """A server of gRPC whose ModelInfer answers so; its port."""
    handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(answer)}
    options = [("grpc.max_receive_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(4), options=options)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


def test_messages_arrive_whole_whatever_their_size() -> None:
    """20 MB do not fit the server's windows; lengths around the size of a frame are cut in frames rightly."""
    random = np.random.default_rng(0)
    lengths = (1, 16384 - 6, 16384 - 5, 16384 - 4, 3 * 16384 - 5, 100_000, 20_000_000)
    messages = [random.integers(0, 256, length, dtype=np.uint8).tobytes() for length in lengths]
    lock, seen = threading.Lock(), set()

    def answer(message: bytes, _: grpc.ServicerContext) -> bytes:
        with lock:
            seen.add(message)
        return struct.pack("<I", len(message)) + message[-100:]

    with answering(answer) as port:
        load, answers = grpc_load("127.0.0.1", port, messages, 3, 1.0, warm_up_s=0.1)
    assert seen == set(messages)
    assert load.requests_per_s > 0
    for index, got in answers:
        assert got[5:] == struct.pack("<I", lengths[index]) + messages[index][-100:]


def test_answers_of_many_frames_arrive_whole() -> None:
    large = bytes(range(256)) * 4000
    with answering(lambda _, __: large) as port:
        _, answers = grpc_load("127.0.0.1", port, [b"x"], 2, 0.2, warm_up_s=0.0)
    assert answers
    assert {answer[5:] for _, answer in answers} == {large}


def test_an_error_is_no_answer() -> None:
    def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")
        raise AssertionError

    with answering(refuse) as port, pytest.raises(LoadError, match="answered a request with an error"):
        grpc_load("127.0.0.1", port, [b"x"], 1, 0.2)


def test_the_message_and_its_answer_are_of_kserve_v2() -> None:
    request = service_pb2.ModelInferRequest.FromString(infer_message("tile_classifier", b"tile", ("a", "b")))
    assert request.model_name == "tile_classifier"
    assert [output.name for output in request.outputs] == ["a", "b"]
    assert (request.inputs[0].name, request.inputs[0].datatype, list(request.inputs[0].shape)) == (
        "tile",
        "BYTES",
        [1, 1],
    )
    assert list(request.raw_input_contents) == [b"\4\0\0\0tile"]
    response = service_pb2.ModelInferResponse()
    response.outputs.add(name="probabilities", datatype="FP32", shape=[1, 2])
    response.raw_output_contents.append(np.asarray([0.25, 0.75], np.float32).tobytes())
    answer = response.SerializeToString()
    whole = struct.pack(">BI", 0, len(answer)) + answer
    assert infer_outputs(whole)["probabilities"].tolist() == [[0.25, 0.75]]
    response.outputs[0].datatype = "BF16"
    other = response.SerializeToString()
    for wrong in (
        b"",
        whole[:-1],
        struct.pack(">BI", 0, 1) + b"\x0a",
        struct.pack(">BI", 0, len(other)) + other,
    ):
        with pytest.raises(LoadError, match="no ModelInferResponse"):
            infer_outputs(wrong)
