"""What the gateway lets through, and what it refuses before Triton hears of it."""

from __future__ import annotations

import dataclasses
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from clients import SlideClient
from clients.errors import AccessRefused, ModelNotReady, RequestRefused, ServerBusy
from deploy.benchmarks.guarded import free_port, running
from tests.deploy.bad_requests import PATHS, SMUGGLED
from tests.deploy.gateway_stack import (
    INFER,
    Answer,
    Stack,
    gateway_stack,
    jpeg_tiles,
    needs_nginx,
    read_answer,
)

pytestmark = needs_nginx
MIB = 1 << 20
CHUNKED = "Transfer-Encoding: chunked\r\n"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with gateway_stack(
        tmp_path_factory.mktemp("a gateway"),
        in_flight=3, in_flight_batch=1, body_limit_bytes=2 * MIB, client_timeout_s=2,
    ) as running:  # fmt: skip
        yield running


@contextmanager
def taking_places(stack: Stack, key: str, count: int) -> Iterator[None]:
    """So many requests under way, each of which has sent half of its body."""
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {key}\r\nContent-Length: 100\r\n\r\n"
    with ExitStack() as connections:
        for _ in range(count):
            connection = connections.enter_context(stack.connect())
            connection.sendall(head.encode() + b"x" * 50)
        time.sleep(0.2)
        yield


def of_ours(answer: Answer, status: int) -> None:
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert len(answer.headers["x-request-id"]) == 32
    assert answer.error


def test_a_slide_client_is_answered_over_both_protocols(stack: Stack) -> None:
    answers = []
    for url in (f"https://{stack.authority}", f"grpcs://{stack.authority}"):
        with SlideClient(url, api_key=stack.keys["lab"], ca=stack.ca) as client:
            assert client.spec.class_names == ("CE", "LAA")
            answers.append(client.classify_tiles(jpeg_tiles()))
    with SlideClient(stack.server["http"]) as client:
        np.testing.assert_allclose(answers[0], client.classify_tiles(jpeg_tiles()))
    np.testing.assert_allclose(answers[0], answers[1])


def test_plain_tritonclient_works_with_the_key_as_a_header(stack: Stack) -> None:
    import tritonclient.grpc as grpc
    import tritonclient.http as http

    tile = np.array([[jpeg_tiles()[0]]], dtype=object)
    found = []
    for module, made in (
        (
            http,
            http.InferenceServerClient(stack.authority, ssl=True, ssl_options={"ca_certs": str(stack.ca)}),
        ),
        (grpc, grpc.InferenceServerClient(stack.authority, ssl=True, root_certificates=str(stack.ca))),
    ):
        for headers in (
            {"x-api-key": stack.keys["lab"]},
            {"authorization": f"Bearer {stack.keys['lab']}"},
        ):
            assert made.is_server_ready(headers=headers)
            assert made.is_model_ready("tile_classifier", headers=headers)
            tensor = module.InferInput("tile", [1, 1], "BYTES")
            tensor.set_data_from_numpy(tile)
            found.append(made.infer("tile_classifier", [tensor], headers=headers).as_numpy("probabilities"))
        made.close()
    for each in found[1:]:
        np.testing.assert_array_equal(each, found[0])


def test_health_of_the_gateway_needs_no_key_and_tells_nothing(stack: Stack) -> None:
    assert stack.ask("/gateway/health").body == b'{"status":"up"}'
    assert stack.ask("/gateway/ready").body == b'{"status":"ready"}'
    of_ours(stack.ask("/gateway/supervisor"), 404)


def test_a_flood_of_questions_for_readiness_reaches_the_supervisor_once_a_second(stack: Stack) -> None:
    asked: list[bytes] = []
    said = b"HTTP/1.1 503 Unavailable\r\nCache-Control: no-store\r\nContent-Length: 2\r\n\r\n{}"
    statuses = set()
    with socket.create_server(("127.0.0.1", 0)) as supervisor, ThreadPoolExecutor(1) as pool:
        supervisor.settimeout(20)

        def answer(count: int) -> None:
            for _ in range(count):
                connection, _ = supervisor.accept()
                with connection:
                    asked.append(connection.recv(1000))
                    connection.sendall(said)

        settings = dataclasses.replace(
            stack.settings,
            directory=stack.state / "flooded",
            listen_port=free_port(),
            health=f"127.0.0.1:{supervisor.getsockname()[1]}",
        )
        flooded = dataclasses.replace(stack, settings=settings)
        with running(settings):
            started_s = time.monotonic()
            answered = pool.submit(answer, 2)
            while not answered.done():
                statuses.add(flooded.ask("/gateway/ready").status)
            assert time.monotonic() - started_s > 0.9
    assert len(asked) == 2
    assert statuses == {503}


@pytest.mark.parametrize(
    "key", [None, "clk_" + 64 * "0", "", "a b", 'x" default "lab', "~.*", "clk_" + 9000 * "0"]
)
def test_without_a_key_that_is_one_nothing_is_answered(stack: Stack, key: str | None) -> None:
    for path in ("/v2", "/v2/health/ready", "/v2/models/tile_classifier", "/v2/repository/index"):
        of_ours(stack.ask(path, key=key), 401 if len(key or "") < 8000 else 400)
    assert "www-authenticate" in stack.ask("/v2").headers


@pytest.mark.parametrize(("path", "status"), PATHS)
def test_other_paths_are_refused(stack: Stack, path: str, status: int) -> None:
    of_ours(stack.ask(path, key=stack.keys["lab"]), status)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "TRACE"])
def test_inference_takes_post_alone(stack: Stack, method: str) -> None:
    of_ours(stack.ask(INFER, key=stack.keys["lab"], method=method), 405)


def test_post_to_metadata_is_refused(stack: Stack) -> None:
    of_ours(stack.ask("/v2/models/tile_classifier", key=stack.keys["lab"], method="POST"), 405)


def test_too_large_a_body_is_refused_before_it_is_sent(stack: Stack) -> None:
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {stack.keys['lab']}\r\n"
    answer = stack.exchange(f"{head}Content-Length: {2 * MIB + 1}\r\n\r\n".encode())
    of_ours(answer, 413)
    assert "2m" in answer.error
    chunks = b"100000\r\n" + MIB * b"x" + b"\r\n"
    of_ours(stack.exchange(f"{head}{CHUNKED}\r\n".encode() + 2 * chunks + b"1\r\nx\r\n0\r\n\r\n"), 413)


def test_requests_of_two_meanings_are_refused(stack: Stack) -> None:
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {stack.keys['lab']}\r\n"
    before = len(stack.log())
    for smuggled in SMUGGLED:
        answer = stack.exchange((head + smuggled).encode())
        assert answer.status in (400, 501), (smuggled, answer)
    lines = stack.log()[before:]
    assert len(lines) == len(
        SMUGGLED
    )  # one answer each: nothing that was hidden in them was taken for a request
    assert not any(line["upstream_status"] for line in lines)


def test_a_slow_head_and_a_slow_body_are_given_up(stack: Stack) -> None:
    with stack.connect() as head, stack.connect() as body:
        started_s = time.monotonic()
        head.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n")
        request = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {stack.keys['lab']}\r\n"
        body.sendall(f"{request}Content-Length: 100\r\n\r\nabc".encode())
        while time.monotonic() < started_s + 1.5:
            head.sendall(b"X-a: b\r\n")
            time.sleep(0.25)
        assert read_answer(head).status in (0, 408)
        assert read_answer(body).status in (0, 408)
        assert time.monotonic() - started_s < 15
    assert stack.infer(stack.keys["lab"], jpeg_tiles()[0]).status == 200


def test_a_client_over_its_rate_is_told_when_to_come_back(stack: Stack) -> None:
    answers = [stack.ask("/v2", key=stack.keys["slow"]) for _ in range(6)]
    assert [answer.status for answer in answers[:3]] == [200, 200, 200]
    refused = [answer for answer in answers if answer.status == 429]
    assert refused[-1].headers["retry-after"] == "1"
    of_ours(refused[-1], 429)
    assert stack.ask("/v2", key=stack.keys["lab"]).status == 200
    url = f"grpcs://{stack.authority}"
    with (
        SlideClient(url, api_key=stack.keys["slow"], ca=stack.ca, retries=0) as client,
        pytest.raises(ServerBusy, match="a second for this key") as caught,
    ):
        [client._ask_card() for _ in range(8)]
    assert caught.value.retry_after_s == 1
    assert caught.value.status == "StatusCode.RESOURCE_EXHAUSTED"


def test_what_does_not_fit_is_refused_at_once_and_batch_takes_nothing_from_interactive(stack: Stack) -> None:
    tile = jpeg_tiles()[0]
    with SlideClient(f"https://{stack.authority}", api_key=stack.keys["lab"], ca=stack.ca) as client:
        card = client.card
    with taking_places(stack, stack.keys["batch"], 1):
        refused = stack.infer(stack.keys["batch"], tile)
        of_ours(refused, 503)
        assert refused.headers["retry-after"] == "1"
        assert stack.infer(stack.keys["lab"], tile).status == 200
        with taking_places(stack, stack.keys["lab"], 3):
            of_ours(stack.infer(stack.keys["lab"], tile), 503)
            assert stack.ask("/v2/health/ready", key=stack.keys["lab"]).status == 200
            url = f"grpcs://{stack.authority}"
            client = SlideClient(url, api_key=stack.keys["lab"], ca=stack.ca, retries=0)
            client._card = card
            with client, pytest.raises(ServerBusy, match="in flight") as caught:
                client.classify([tile])
            assert caught.value.retry_after_s == 1
    time.sleep(0.2)
    assert stack.infer(stack.keys["batch"], tile).status == 200


def test_a_client_has_no_more_in_flight_than_its_own_limit(stack: Stack) -> None:
    with taking_places(stack, stack.keys["narrow"], 1):
        of_ours(stack.infer(stack.keys["narrow"], jpeg_tiles()[0]), 503)
        assert stack.infer(stack.keys["lab"], jpeg_tiles()[0]).status == 200


def test_the_admin_token_of_triton_is_of_no_use_here(stack: Stack) -> None:
    import tritonclient.grpc as grpc
    from tritonclient.utils import InferenceServerException

    told = next(
        json.loads(path.read_text())
        for path in Path(stack.server["log"]).parent.glob("*.json")
        if path.stem == stack.server["name"]
    )
    token = told["admin_token"]
    lines = f"clotline-admin: {token}\r\nTriton-Grpc-Protocol-Clotline-Admin: {token}\r\n"
    of_ours(stack.ask("/v2/models/tile_classifier/stats", key=stack.keys["lab"], headers=lines), 403)
    headers = {"x-api-key": stack.keys["lab"], "triton-grpc-protocol-clotline-admin": token}
    direct = grpc.InferenceServerClient(stack.server["grpc"])
    assert direct.get_inference_statistics(headers=headers)
    guarded = grpc.InferenceServerClient(stack.authority, ssl=True, root_certificates=str(stack.ca))
    with pytest.raises(InferenceServerException, match="not offered"):
        guarded.get_inference_statistics(headers=headers)


def test_grpc_refuses_with_statuses_of_grpc(stack: Stack) -> None:
    import grpc as plain
    import tritonclient.grpc as grpc
    from tritonclient.utils import InferenceServerException

    client = grpc.InferenceServerClient(stack.authority, ssl=True, root_certificates=str(stack.ca))
    key = {"x-api-key": stack.keys["lab"]}

    def refused(headers: dict[str, str], size_bytes: int = 10, **options: str) -> str:
        tensor = grpc.InferInput("tile", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[b"x" * size_bytes]], dtype=object))
        with pytest.raises(InferenceServerException) as caught:
            client.infer("tile_classifier", [tensor], headers=headers, **options)
        return str(caught.value.status()).removeprefix("StatusCode.")

    assert refused({}) == "UNAUTHENTICATED"
    assert refused({"x-api-key": "clk_" + 64 * "1"}) == "UNAUTHENTICATED"
    assert refused(key, 3 * MIB) == "INVALID_ARGUMENT"
    assert refused(key, compression_algorithm="gzip") == "UNIMPLEMENTED"
    for call in (client.get_model_repository_index, client.get_trace_settings, client.get_log_settings):
        with pytest.raises(InferenceServerException, match="not offered"):
            call(headers=key)
    assert refused(key) == "INVALID_ARGUMENT"  # by Triton: not an image
    credentials = plain.ssl_channel_credentials(stack.ca.read_bytes())
    with plain.secure_channel(stack.authority, credentials) as channel:
        with pytest.raises(plain.RpcError) as caught:
            channel.unary_unary("/grpc.reflection.v1.ServerReflection/Info")(b"", timeout=10)
        assert caught.value.code() is plain.StatusCode.UNIMPLEMENTED


def test_a_stream_of_grpc_is_answered_as_it_goes(stack: Stack) -> None:
    import queue
    from typing import Any

    import tritonclient.grpc as grpc

    client = grpc.InferenceServerClient(stack.authority, ssl=True, root_certificates=str(stack.ca))
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(
        lambda result, error: answers.put((result, error)), headers={"x-api-key": stack.keys["lab"]}
    )
    for tile in jpeg_tiles():
        tensor = grpc.InferInput("tile", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[tile]], dtype=object))
        client.async_stream_infer("tile_classifier", [tensor])
        result, error = answers.get(timeout=30)
        assert error is None
        assert result.as_numpy("probabilities").shape == (1, 2)
    client.stop_stream()


def test_errors_of_clients_say_what_is_wrong(stack: Stack) -> None:
    for scheme in ("https", "grpcs"):
        url = f"{scheme}://{stack.authority}"
        stranger = SlideClient(url, api_key="clk_wrong", ca=stack.ca)
        with stranger, pytest.raises(AccessRefused, match="API key"):
            stranger.spec  # noqa: B018
        astray = SlideClient(url, api_key=stack.keys["lab"], ca=stack.ca, model="nothing")
        with astray, pytest.raises(ModelNotReady, match="nothing"):
            astray.spec  # noqa: B018
        heavy = SlideClient(url, api_key=stack.keys["lab"], ca=stack.ca)
        with heavy, pytest.raises(RequestRefused):
            heavy.classify([b"x" * 3 * MIB])


def test_the_request_id_is_passed_on_if_it_is_sane(stack: Stack) -> None:
    key = stack.keys["lab"]
    taken = stack.ask("/v2", key=key, headers="X-Request-ID: case-7.a_b\r\n")
    assert taken.headers["x-request-id"] == "case-7.a_b"
    told = ["case-7.a_b"]
    for other in ("", "a b", "x" * 65, '"}'):
        made = stack.ask("/v2", key=key, headers=f"X-Request-ID: {other}\r\n").headers["x-request-id"]
        assert len(made) == 32
        told.append(made)
    logged = [
        line["request_id"] for line in stack.log()
    ]  # each worker of nginx writes its own lines when it likes
    assert [logged.count(request_id) for request_id in told] == [1] * len(told)


def test_the_log_knows_the_key_by_its_id_alone(stack: Stack) -> None:
    key = stack.keys["lab"]
    stack.infer(key, jpeg_tiles()[0])
    stack.ask(f"/v2?key={key}", key=key)
    stack.ask(f"/v2/{key}", key=key)
    stack.ask("/v2", headers=f"X-Request-ID: {key}\r\n")
    lines = stack.log()
    assert not any(secret in stack.log_text() for secret in stack.keys.values())
    infer = next(line for line in lines if line["path"] == INFER and line["key"] == "lab.1")
    assert (infer["status"], infer["upstream_status"], infer["protocol"], infer["route"]) == (
        "200", "200", "http", "infer",
    )  # fmt: skip
    assert infer["tls"] == "TLSv1.3"
    assert 0 < float(infer["upstream_s"]) <= float(infer["request_s"]) + 0.002  # each rounded by itself
    refused = [line for line in lines if line["status"] in ("401", "403", "405", "413", "415", "429")]
    assert {line["upstream_status"] for line in refused} == {""}  # Triton did not hear of them


def test_tls_is_of_today(stack: Stack) -> None:
    import ssl

    for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
        context = ssl.create_default_context(cafile=str(stack.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = version
        raw = socket.create_connection(("127.0.0.1", stack.settings.listen_port))
        with raw, pytest.raises(ssl.SSLError):
            context.wrap_socket(raw, server_hostname="localhost")
    plain = socket.create_connection(("127.0.0.1", stack.settings.listen_port), timeout=10)
    with plain:
        plain.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert plain.recv(100).startswith(b"HTTP/1.1 400")
