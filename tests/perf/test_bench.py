"""The whole measurement, on a real server with a real perf_analyzer, and its arithmetic."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perf import bench
from perf.__main__ import main
from perf.analyzer import analyzer_load
from perf.bench import Turn, layout_of, summary
from perf.bench_server import BenchServer, serving
from perf.errors import LoadError, PerfInputError
from perf.grpc_load import grpc_load, infer_message, infer_outputs
from perf.http_load import http_load, infer_answer, infer_request
from perf.inputs import write_inputs
from perf.limit import Layout, Sample
from perf.load import LoadFigures


def turn(ratio: float, p95_ms: float = 12.0, cpu: float = 20.0) -> Turn:
    load = LoadFigures(requests_per_s=100 * ratio, mean_ms=10.0, p50_ms=10.0, p95_ms=p95_ms, load_cpu_s=0.1)
    return Turn(load, cpu, 0.2, ratio, 1.1, cpu / 20.0)


def test_the_summary_takes_medians_and_at_the_top_the_worse_protocol() -> None:
    limits = [
        Sample(100.0, 20.0, 10.0, 10.0),
        Sample(50.0, 22.0, 11.0, 12.0),
        Sample(110.0, 21.0, 10.0, 11.0),
    ]
    turns = {
        "http": [turn(0.97), turn(0.5), turn(0.99)],
        "grpc": [turn(0.96, 13.0), turn(0.95, 15.0), turn(2.0)],
    }
    answer = summary(limits, turns)
    assert answer["protocols"]["http"]["ratio_to_limit"] == 0.97
    assert answer["ratio_to_limit"] == answer["protocols"]["grpc"]["ratio_to_limit"] == 0.96
    assert answer["p95_ms"] == 13.0
    assert answer["p95_to_mean"] == 1.3
    assert answer["limit_per_s"] == 100.0
    assert answer["limit_cpu_s_per_1000"] == 21.0
    assert answer["ratio_rounds"]["grpc"] == [0.96, 0.95, 2.0]


def test_layouts_are_named_by_three_numbers() -> None:
    assert layout_of("2x1x4") == Layout(2, 1, 4, spin=False)
    for wrong in ("2", "2x1", "0x1x1", "axbxc", "2x1x1x1"):
        with pytest.raises(PerfInputError, match="2x1x1"):
            layout_of(wrong)


@pytest.fixture(scope="module")
def server(tiny_repository: Path) -> Iterator[BenchServer]:
    with serving(tiny_repository) as server:
        yield server


def test_the_load_generators_are_answered_and_counted(
    server: BenchServer, tiles: list[bytes], analyzer: Path, tmp_path: Path
) -> None:
    before = server.requests("tile_classifier")
    host, _, port = server.http.rpartition(":")
    requests = [infer_request("tile_classifier", tile, bench.OUTPUTS, server.http) for tile in tiles]
    cpu_before_s = server.cpu_s()
    load, answers = http_load(host, int(port), requests, 3, 0.4, warm_up_s=0.1)
    assert load.requests_per_s > 0
    assert load.p95_ms >= load.p50_ms > 0
    assert {index for index, _ in answers} == set(range(len(tiles)))
    first = infer_answer(answers[0][1])
    assert first["probabilities"].shape == (1, 2)
    assert first["probabilities"].sum() == pytest.approx(1, abs=1e-5)
    assert server.cpu_s() > cpu_before_s
    # Up to three are in flight when the loop ends.
    assert len(answers) <= server.requests("tile_classifier") - before <= len(answers) + 4

    host, _, port = server.grpc.rpartition(":")
    messages = [infer_message("tile_classifier", tile, bench.OUTPUTS) for tile in tiles]
    before = server.requests("tile_classifier")
    load, over_grpc = grpc_load(host, int(port), messages, 3, 0.4, warm_up_s=0.1)
    assert load.p95_ms >= load.p50_ms > 0
    by_index = {index: infer_answer(answer) for index, answer in answers}
    assert {index for index, _ in over_grpc} == set(by_index)
    for index, answer in over_grpc:
        for name, array in infer_outputs(answer).items():
            assert array.shape == by_index[index][name].shape
            assert array == pytest.approx(by_index[index][name], abs=1e-5)
    assert len(over_grpc) <= server.requests("tile_classifier") - before <= len(over_grpc) + 4

    before = server.requests("tile_classifier")
    grpc = analyzer_load("grpc", server.grpc, "tile_classifier", write_inputs(tmp_path, tiles), 2, 0.5)
    assert grpc.requests_per_s > 0
    assert grpc.p95_ms >= grpc.p50_ms > 0
    assert server.requests("tile_classifier") > before


def test_an_error_of_the_server_is_no_answer(server: BenchServer) -> None:
    host, _, port = server.http.rpartition(":")
    request = infer_request("tile_classifier", b"no image", bench.OUTPUTS, server.http)
    _, answers = http_load(host, int(port), [request], 1, 0.05, warm_up_s=0.01)
    with pytest.raises(LoadError, match="no image"):
        infer_answer(answers[0][1])
    host, _, port = server.grpc.rpartition(":")
    with pytest.raises(LoadError, match="answered a request with an error"):
        grpc_load(host, int(port), [infer_message("tile_classifier", b"no image", bench.OUTPUTS)], 1, 0.05)


@pytest.mark.parametrize("load", [http_load, grpc_load])
def test_nobody_at_the_port(load: Any) -> None:
    with pytest.raises(LoadError, match="Is the server up"):
        load("127.0.0.1", 9, [b""], 1, 0.1)


@pytest.mark.parametrize("grpc_load", bench.GRPC_LOADS)
def test_the_command_measures_against_the_limit_and_checks_every_answer(
    grpc_load: str,
    server: BenchServer,
    tiny_repository: Path,
    analyzer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        bench, "serving", lambda repository: contextlib.nullcontext(server)
    )  # it is up already
    asked = ["bench", "--repository", str(tiny_repository), "--tile-size-px", "64", "--rounds", "1", "--seconds", "0.4",
             "--concurrency", "2", "--layout", "1x1x1", "--grpc-load", grpc_load]  # fmt: skip
    assert main(asked) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {
        "ratio_to_limit",
        "p95_ms",
        "p95_to_mean",
        "cpu_s_per_1000",
        "limit_cpu_s_per_1000",
        "model",
        "machine",
    } <= set(answer)
    assert answer["protocol"] == "http+grpc"
    assert answer["ratio_to_limit"] > 0
    assert answer["answers_checked"] > 40
    assert answer["max_abs_diff"] <= 1e-4


def test_a_wrong_answer_stops_the_measurement(
    server: BenchServer, tiles: list[bytes], tmp_path: Path
) -> None:
    expected_NK = np.full((len(tiles), 2), 0.5)
    measured = bench._Bench(server, "tile_classifier", tiles, expected_NK, tmp_path, 1)
    with pytest.raises(LoadError, match="wrong answers is worth nothing"):
        measured.check_over("grpc")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--repository", "nowhere"], "nowhere is no directory"),
        (["--repository", ".", "--classifier", "absent"], "holds no model absent"),
        (["--repository", ".", "--protocols", "http,smoke", "--rounds", "0"], "smoke"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "perf", "bench", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
