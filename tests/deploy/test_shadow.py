"""The real process between real tritonservers of tiny releases; fakes, named so, only for servers that behave badly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.benchmarks.guarded import free_port
from deploy.shadow import MIB
from deploy.shadow_answers import GRPC_PATH, Answer, Comparison, DifferenceLog, Question, compare
from perf.bench_server import BenchServer
from tests.deploy.shadow_stack import (
    ALL,
    BAD_TILE,
    INFER,
    OTHER_BIAS,
    STABLE_BIAS,
    TILE,
    Running,
    arguments,
    frame,
    polite,
    rest,
    shadow_here,
    shadow_process,
    sides,
    tiny_server,
    wait_until,
)


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BenchServer]:
    with tiny_server(tmp_path_factory.mktemp("stable"), STABLE_BIAS) as server:
        yield server


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BenchServer]:
    """A release that says LAA where the stable one says CE."""
    with tiny_server(tmp_path_factory.mktemp("other"), OTHER_BIAS) as server:
        yield server


@pytest.fixture
def shadow(stable: BenchServer, other: BenchServer, tmp_path: Path) -> Iterator[Running]:
    """Between the two."""
    with shadow_process(sides(stable), sides(other), tmp_path) as running:
        yield running


@pytest.fixture
def silent() -> Iterator[str]:
    """A fake: takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_the_same_release_gives_the_same_until_it_is_gone(stable: BenchServer, tmp_path: Path) -> None:
    with (
        tiny_server(tmp_path, STABLE_BIAS) as twin,
        shadow_process(sides(stable), sides(twin), tmp_path) as shadow,
    ):
        assert shadow.post(INFER, *rest(TILE)) == 204
        assert shadow.post(GRPC_PATH, frame(TILE)) == 204
        assert shadow.wait(2) == {("tile_classifier", "same_label"): 2}
        samples = shadow.samples()
        assert samples["probability_difference_count", "tile_classifier"] == 2
        assert samples["probability_difference_sum", "tile_classifier"] < 1e-6
        assert (
            samples["duration_seconds_count", "stable"] == samples["duration_seconds_count", "candidate"] == 2
        )
        assert shadow.lines() == []

        os.kill(twin.pid, signal.SIGKILL)
        wait_until(lambda: not reachable(twin.http) and not reachable(twin.grpc))
        assert (
            shadow.post(
                INFER,
                *rest(TILE),
            )
            == 204
        )
        assert shadow.post(GRPC_PATH, frame(TILE)) == 204
        assert shadow.wait(4)["tile_classifier", "candidate_failed"] == 2
        assert shadow.samples()["duration_seconds_count", "stable"] == 4
        assert shadow.samples()["duration_seconds_count", "candidate"] == 2
        for line in shadow.lines():
            assert line["result"] == "candidate_failed"
            assert line["error"]
            assert line["labels"] == {"stable": [0]}


def reachable(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def test_another_release_is_told_by_its_labels(shadow: Running) -> None:
    body, headers = rest(TILE)
    assert shadow.post(INFER, body, {**headers, "X-Request-ID": "abc-1", "X-API-Key": "clk_secret"}) == 204
    as_json = [{"name": name} for name in ALL]
    assert shadow.post("/v2/models/tile_classifier/versions/1/infer", *rest(TILE, as_json)) == 204
    assert shadow.post(GRPC_PATH, frame(TILE), {"Content-Type": "application/grpc"}) == 204
    chunks = frame(TILE, ["probabilities"])
    assert shadow.post(GRPC_PATH, (chunks[at : at + 100] for at in range(0, len(chunks), 100))) == 204
    assert shadow.wait(4) == {("tile_classifier", "other_label"): 4}
    samples = shadow.samples()
    assert samples["label_changes_total", "1", "tile_classifier", "0"] == 4  # candidate, model, stable
    expected = probability(STABLE_BIAS) - probability(OTHER_BIAS)
    assert samples["probability_difference_sum", "tile_classifier"] == pytest.approx(4 * expected, abs=1e-3)
    lines = shadow.lines()
    assert sorted(line["protocol"] for line in lines) == ["grpc", "grpc", "http", "http"]
    for line in lines:
        assert line["labels"] == {"stable": [0], "candidate": [1]}
        assert line["versions"] == {"stable": "1", "candidate": "1"}
        assert line["probabilities"]["candidate"][0][0] == pytest.approx(probability(OTHER_BIAS), abs=1e-4)
        assert line["difference"] == pytest.approx(expected, abs=1e-3)
    assert {line["request_id"] for line in lines} == {"abc-1", ""}
    assert "clk_secret" not in shadow.log.read_text()


def probability(bias: float) -> float:
    """Of class 0."""
    from serving.benchmarks.tiny_release import answer

    return float(answer(TILE, 32, bias, 2)[0])


def test_what_was_asked_for_is_compared(shadow: Running) -> None:
    names = {"name": "probabilities", "parameters": {"classification": 1}}
    assert shadow.post(INFER, *rest(TILE, [names])) == 204
    assert shadow.post(GRPC_PATH, frame(TILE, ["confidence"])) == 204
    assert shadow.wait(2) == {("tile_classifier", "not_compared"): 2}
    assert shadow.post(INFER, *rest(TILE, [names, {"name": "label_index"}])) == 204
    assert shadow.wait(3)["tile_classifier", "other_label"] == 1
    assert ("probability_difference_count", "tile_classifier") not in shadow.samples()


def test_what_the_stable_release_refuses_is_no_fault_of_the_candidate(shadow: Running) -> None:
    assert shadow.post(INFER, *rest(BAD_TILE)) == 204
    assert shadow.post(GRPC_PATH, frame(BAD_TILE)) == 204
    assert shadow.post("/v2/models/no_such_model/infer", *rest(TILE)) == 204
    assert shadow.wait(3) == {("other", "stable_failed"): 3}
    assert sorted(line["model"] for line in shadow.lines()) == [
        "no_such_model",
        "tile_classifier",
        "tile_classifier",
    ]
    assert all(line["error"] for line in shadow.lines())
    assert shadow.samples()["duration_seconds_count", "stable"] == 0


def test_malformed_requests_are_refused_and_do_no_harm(shadow: Running) -> None:
    good = frame(TILE)
    assert shadow.post(GRPC_PATH, b"\1" + good[1:]) == 400  # compressed
    assert shadow.post(GRPC_PATH, good[:-1]) == 400
    assert shadow.post(GRPC_PATH, good + b"x") == 400
    assert shadow.post(GRPC_PATH, b"") == 400
    for head, expected in {
        "Content-Length: -1": b"400", "Content-Length: x": b"400", "Transfer-Encoding: gzip": b"400",
        "Content-Length: 3\r\nTransfer-Encoding: chunked": b"400",
        f"Content-Length: {64 * MIB + 1}": b"413",
    }.items():  # fmt: skip
        assert expected in shadow.raw(f"POST {INFER} HTTP/1.1\r\nHost: a\r\n{head}\r\n\r\n".encode()), head
    chunked = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    assert b"413" in shadow.raw(chunked + b"4000001\r\n")
    assert b"413" in shadow.raw(chunked + b"3\r\nabc\r\n3fffffe\r\n")
    assert b"400" in shadow.raw(chunked + b"-3\r\nabc\r\n")
    assert b"400" in shadow.raw(chunked + b"3\r\nabcdef")
    with socket.create_connection(("127.0.0.1", shadow.port)) as connection:
        connection.sendall(f"POST {INFER} HTTP/1.1\r\nContent-Length: 100\r\n\r\nabc".encode())  # and leaves
    for path in (
        "/",
        "/v2/models/a/load",
        f"{INFER}?x=1",
        "/v2/models/../infer",
        GRPC_PATH.replace("Infer", "Config"),
    ):
        assert shadow.post(path, b"x") == 404, path
    assert shadow.results() == {}
    # A body that only Triton can refuse is asked of it.
    assert shadow.post(GRPC_PATH, b"\0\0\0\0\3\xff\xff\xff") == 204
    assert shadow.post(INFER, b"garbage") == 204
    assert shadow.post(INFER, b"{}", {"Inference-Header-Content-Length": "-7"}) == 204
    assert shadow.wait(3) == {("other", "stable_failed"): 3}
    assert shadow.post(INFER, *rest(TILE)) == 204
    assert shadow.wait(4)["tile_classifier", "other_label"] == 1
    assert shadow.samples()["dropped_total",] == 0


def test_what_finds_no_room_is_dropped_and_counted(silent: str, tmp_path: Path) -> None:
    with shadow_here(
        tmp_path, (silent, silent), (silent, silent), workers=1, most_requests=3, most_bytes=10_000
    ) as shadow:
        assert [shadow.post(INFER, b"x" * 100) for _ in range(3)] == [204] * 3
        wait_until(lambda: shadow.samples()["queue",] == 2)  # the third is being asked
        assert shadow.samples()["dropped_total",] == 0
        assert shadow.post(INFER, b"x" * 100) == 204
        assert shadow.samples()["dropped_total",] == 1
    with shadow_here(
        tmp_path, (silent, silent), (silent, silent), workers=1, most_requests=3, most_bytes=10_000
    ) as shadow:
        assert shadow.post(INFER, b"x" * 6_000) == 204
        assert shadow.post(INFER, iter([b"x" * 3_000, b"x" * 3_000])) == 204
        assert shadow.samples()["dropped_total",] == 1
        assert shadow.post(INFER, b"x" * 4_000) == 204  # what was dropped takes no room
        assert shadow.samples()["dropped_total",] == 1


def test_room_is_given_back(silent: str, tmp_path: Path) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    with shadow_here(
        tmp_path, (nowhere, nowhere), (silent, silent), workers=1, most_requests=1, most_bytes=100
    ) as shadow:
        for count in range(1, 4):
            assert shadow.post(INFER, b"x" * 100) == 204
            shadow.wait(count)
            assert shadow.post(GRPC_PATH, b"\1garbage") == 400
            assert b"400" in shadow.raw(
                f"POST {INFER} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcdef".encode()
            )
            wait_until(lambda: shadow.samples()["queue",] == 0)
        assert shadow.samples()["dropped_total",] == 0


def test_a_server_that_is_silent_is_given_up(silent: str, tmp_path: Path) -> None:
    with (
        polite() as (address, _),
        shadow_here(tmp_path, (address, silent), (silent, silent), timeout_s=0.3) as shadow,
    ):
        assert shadow.post(INFER, b"{}") == 204
        assert shadow.wait(1) == {("tile_classifier", "candidate_failed"): 1}
        assert shadow.post(GRPC_PATH, frame(TILE)) == 204
        assert shadow.wait(2)["tile_classifier", "stable_failed"] == 1
        assert "DEADLINE_EXCEEDED" in shadow.lines()[1]["error"]


def test_models_are_few_headers_stay_here_and_connections_are_kept_while_there_is_work(
    tmp_path: Path,
) -> None:
    with (
        polite() as (address, seen),
        shadow_here(tmp_path, (address, address), (address, address), workers=1) as shadow,
    ):
        secret = {
            "X-API-Key": "clk_1",
            "Authorization": "Bearer clk_1",
            "clotline-admin": "token",
            "Cookie": "a",
        }
        for number in range(60):
            assert (
                shadow.post(f"/v2/models/m{number}/infer", b"{}", {**secret, "Content-Type": "text/x"}) == 204
            )
        results = shadow.wait(60)
        assert len(results) == 51
        assert results["other", "same_label"] == 10
        assert set(seen.seen[0]) == {"host", "accept-encoding", "content-length", "content-type"}
        assert len(seen.seen) == 120
        assert seen.open == 2
        wait_until(lambda: seen.open == 0, 5)  # Triton's graceful stop waits for open ones


def test_a_connection_that_the_server_closed_is_opened_again(tmp_path: Path) -> None:
    with (
        polite(hangs_up=True) as (address, _),
        shadow_here(tmp_path, (address, address), (address, address), workers=1) as shadow,
    ):
        for count in range(1, 5):
            assert shadow.post(INFER, b"{}") == 204
            assert shadow.wait(count) == {("tile_classifier", "same_label"): count}


def test_it_ends_cleanly_while_it_waits_for_answers(silent: str, tmp_path: Path) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):
        with shadow_process((silent, silent), (silent, silent), tmp_path) as shadow:
            assert shadow.post(INFER, b"{}") == 204
            assert shadow.post(GRPC_PATH, frame(TILE)) == 204
            assert shadow.process
            wait_until(lambda shadow=shadow: shadow.samples()["queue",] == 0)  # type: ignore[misc]
            shadow.process.send_signal(signum)
            assert shadow.process.wait(10) == 0
            assert shadow.process.stderr
            assert shadow.process.stderr.read() == ""
            assert shadow.lines() == []  # that it was ended is no failure of a server


def test_calls_of_grpc_end_with_it(silent: str, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with shadow_here(tmp_path, (silent, silent), (silent, silent)) as shadow:
        assert shadow.post(GRPC_PATH, frame(TILE)) == 204
        wait_until(lambda: shadow.samples()["queue",] == 0)
    assert "shadow" not in {thread.name for thread in set(threading.enumerate()) - before}


def test_what_cannot_be_meant_or_used_is_told(silent: str, tmp_path: Path) -> None:
    good = ("127.0.0.1:1", "127.0.0.1:2")
    taken = int(silent.rpartition(":")[2])
    cases = [
        (arguments(("http://a:1", "a"), ("a:70000", "[::1]:2"), 0, tmp_path / "l"), 2, "--stable-http http://a:1, --stable-grpc a, --candidate-http a:70000."),
        (arguments(good, good, taken, tmp_path / "l"), 1, f"--port {taken}"),
        (arguments(good, good, 0, tmp_path), 1, "--log"),
    ]  # fmt: skip
    for command, code, words in cases:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr
        assert words in done.stderr


def answer_of(**tensors: Any) -> Answer:
    types = {"probabilities": np.float32, "label_index": np.int64, "answered": np.bool_}
    return Answer("1", {name: np.array(value, types[name]) for name, value in tensors.items()})


@pytest.mark.parametrize(
    ("stable", "candidate", "expected"),
    [
        ({"probabilities": [0.5, 0.25]}, {"probabilities": [0.5, 0.25]}, Comparison("same_label", (), 0.0)),
        ({"probabilities": [0.5, 0.25]}, {"probabilities": [0.25, 0.5]}, Comparison("other_label", ((0, 1),), 0.25)),
        ({"probabilities": [0.5, 0.25]}, {"probabilities": [[0.5, 0.25]]}, Comparison("shape_differs")),
        ({"probabilities": [1, 0], "label_index": [0]}, {"probabilities": [1, 0]}, Comparison("shape_differs")),
        ({"probabilities": [1.0]}, {"probabilities": [np.nan]}, Comparison("same_label", (), 1.0)),
        ({"label_index": [[1], [2]]}, {"label_index": [[1], [11]]}, Comparison("other_label", ((2, 11),))),
        ({"label_index": [1], "answered": [True]}, {"label_index": [1], "answered": [False]},
         Comparison("other_label", ((1, "abstained"),))),
        ({"label_index": [1], "answered": [False]}, {"label_index": [0], "answered": [False]}, Comparison("same_label")),
        ({"answered": [True]}, {"answered": [False]}, Comparison("not_compared")),
    ],
)  # fmt: skip
def test_answers_are_compared_by_label_and_probability(
    stable: Any, candidate: Any, expected: Comparison
) -> None:
    assert compare(answer_of(**stable), answer_of(**candidate)) == expected


def test_the_log_keeps_one_older_part(tmp_path: Path) -> None:
    log = DifferenceLog(tmp_path / "new" / "log.jsonl", most_bytes=1000)
    answers = {"stable": answer_of(probabilities=[0.12345678, np.nan])}
    for number in range(20):
        log.write(
            Question(INFER, b"{}", request_id=str(number)), Comparison("candidate_failed"), answers, "gone"
        )
    parts = [tmp_path / "new" / "log.jsonl.1", tmp_path / "new" / "log.jsonl"]
    assert sorted(parts) == sorted((tmp_path / "new").iterdir())
    lines = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    assert all(0 < part.stat().st_size <= 1000 for part in parts)
    assert [line["request_id"] for line in lines] == [str(number) for number in range(20 - len(lines), 20)]
    assert lines[0]["probabilities"] == {"stable": [0.123457, None]}
    assert lines[0]["time"].endswith("Z")
