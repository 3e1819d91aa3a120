"""What models count on a real tritonserver: exact numbers, from all instances, over releases and the death of a stub."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from google.protobuf import text_format
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import model_config_pb2

from serving.benchmarks.kills import victims
from serving.benchmarks.tiny_release import answer, make_release, tiles, write_manifest
from serving.stubs import stubs_of
from slides.appearance import CONFIDENCE_EDGES, STATISTICS, appearance
from slides.decode import decode_tile
from slides.errors import TileDecodeError
from slides.model_metrics import ANSWERS_FOR, COUNTS_EVERY_S, ModelMetrics
from slides.spec import ModelSpec
from tests.conftest import run_module
from tests.serving.conftest import Launch, wait_until
from tests.serving.test_launcher import state_of

CLASSES = ("CE", "LAA")
TILES = tiles(64)
INPUT_PX = 32
BIASES = {"a": -1.0, "b": 1.0, "c": -2.0}
PORTS = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
Labels = frozenset[tuple[str, str]]
PREDICTIONS = "clotline_predictions_total"
OUTPUTS = ("probabilities", "confidence", "label_index")


def make_counted(directory: Path, bias: float) -> Path:
    """A tiny release with two instances of each part, warm-up, and a network that says whose answers it gives."""
    release = make_release(directory, bias=bias, instances=2)
    path = release / "models" / "tile_network_onnx" / "config.pbtxt"
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    told = json.dumps({"model": "tile_classifier", "classes": CLASSES})
    config.parameters[ANSWERS_FOR].string_value = told
    for batch in (1, 3):
        zeros = config.model_warmup.add(name=f"batch_{batch}", batch_size=batch).inputs["tiles"]
        zeros.data_type = model_config_pb2.TYPE_UINT8
        zeros.dims.extend([INPUT_PX, INPUT_PX, 3])
        zeros.zero_data = True
    path.write_text(text_format.MessageToString(config))
    manifest = json.loads((release / "release.json").read_text())
    spec = ModelSpec.from_json(json.dumps(manifest["spec"]))
    write_manifest(release, {"tile_classifier": {"network": "tile_network_onnx", "format": "onnx"}}, spec)
    return release


def scrape(url: str) -> dict[tuple[str, Labels], float]:
    """Every sample of an exposition, as Prometheus' Python parser reads it, but that it puts _total behind counters."""
    with urllib.request.urlopen(url, timeout=10) as got:
        text = got.read().decode()
    return {
        (real_name(sample.name, text), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def real_name(name: str, text: str) -> str:
    return name if re.search(rf"^{name}\b", text, re.MULTILINE) else name.removesuffix("_total")


@dataclass
class Server:
    """A server on a live directory."""

    name: str
    addresses: dict[str, Any]
    releases: dict[str, Path]

    def ask(self, data: list[bytes], *, read: str = "probabilities", **options: Any) -> np.ndarray:
        client = triton.InferenceServerClient(self.addresses["http"], network_timeout=30)
        tensor = triton.InferInput("tile", [len(data), 1], "BYTES")
        tensor.set_data_from_numpy(np.array(data, dtype=np.object_)[:, None])
        try:
            return np.asarray(client.infer("tile_classifier", [tensor], **options).as_numpy(read))
        finally:
            client.close()

    def value(self, name: str, **labels: str) -> float:
        return scrape(self.addresses["metrics"])[(name, frozenset(labels.items()))]

    def histogram(self, name: str, **labels: str) -> dict[str, float]:
        """Bucket by its label `le`."""
        wanted = set(labels.items())
        return {
            dict(found)["le"]: value
            for (metric, found), value in scrape(self.addresses["metrics"]).items()
            if metric == f"{name}_bucket" and wanted <= found
        }

    def predictions(self) -> dict[str, float]:
        return {name: self.value(PREDICTIONS, model="tile_classifier", **{"class": name}) for name in CLASSES}

    def ask_and_count(self, data: list[bytes], times: int, **options: Any) -> None:
        """Ask, and wait until all of it is counted, and nothing else."""
        before = sum(self.predictions().values())
        for _ in range(times):
            assert len(self.ask(data, **options)) == len(data)
        wait_until(lambda: sum(self.predictions().values()) >= before + times * len(data), 10)
        assert sum(self.predictions().values()) == before + times * len(data)

    def is_told_to_serve(self, wanted: dict[str, str]) -> bool:
        infos = [dict(labels) for name, labels in self.supervisor() if name == "clotline_release_info"]
        return infos == [wanted]

    def supervisor(self) -> dict[tuple[str, Labels], float]:
        return scrape(self.addresses["health"] + "/metrics")


@contextmanager
def counted_server(name: str, live: Path, releases: dict[str, Path], *words: str | Path) -> Iterator[Server]:
    """`serving up` on a live directory, with `words` behind it."""
    done = run_module("serving", "up", "--live", live, "--name", name, *PORTS, "--detach", *words)
    assert done.returncode == 0, done.stderr
    try:
        yield Server(name, json.loads(done.stdout.splitlines()[-1]), releases)
    finally:
        run_module("serving", "down", "--name", name)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("counted")
    releases = {name: make_counted(top / name, bias) for name, bias in BIASES.items()}
    with counted_server(f"metrics-{os.getpid()}", top / "live", releases, "--release", releases["a"]) as up:
        yield up


def test_every_series_is_there_before_the_first_request(server: Server) -> None:
    wait_until(lambda: ("clotline_tile_appearance_count", frozenset(
        {("model", "tile_preprocess"), ("statistic", "sharpness")})) in scrape(server.addresses["metrics"]), 10)  # fmt: skip
    found = {
        key: value
        for key, value in scrape(server.addresses["metrics"]).items()
        if key[0].startswith("clotline")
    }
    assert not any(found.values()), "warm-up, proofs and golden examples are no predictions"
    models = {dict(labels)["model"] for _, labels in found}
    assert models == {"tile_classifier", "tile_preprocess"}
    assert {
        dict(labels)["reason"] for name, labels in found if name == "clotline_rejected_inputs_total"
    } == set(TileDecodeError.REASONS)
    edges = server.histogram("clotline_prediction_confidence", **{"class": "LAA"})
    assert set(edges) == {*map(str, CONFIDENCE_EDGES), "+Inf"}
    for statistic, wanted in STATISTICS.items():
        assert set(server.histogram("clotline_tile_appearance", statistic=statistic)) == {
            *map(str, wanted),
            "+Inf",
        }


def test_good_and_bad_tiles_of_all_instances_are_counted_exactly(server: Server) -> None:
    predictions, rejected = server.predictions(), {}
    for reason in TileDecodeError.REASONS:
        rejected[reason] = server.value(
            "clotline_rejected_inputs_total", model="tile_preprocess", reason=reason
        )
    decoded = server.value("clotline_decode_duration_seconds_count", model="tile_preprocess")
    confidences = {
        name: server.histogram("clotline_prediction_confidence", **{"class": name}) for name in CLASSES
    }
    bad = {"not_an_image": b"this is none", "empty": b"", "truncated": TILES[0][: len(TILES[0]) // 2]}

    def ask(number: int) -> None:
        if number % 5 == 4:
            with pytest.raises(triton.InferenceServerException):
                server.ask([list(bad.values())[number % 3]])
        else:
            server.ask(TILES if number % 5 else TILES[:1])

    with ThreadPoolExecutor(6) as threads:  # both instances of both parts
        list(threads.map(ask, range(60)))
    wanted = dict.fromkeys(CLASSES, 0.0)
    expected = {name: np.zeros(len(CONFIDENCE_EDGES) + 1) for name in CLASSES}
    for tile, times in zip(TILES, (12 + 36, 36, 36, 36), strict=True):
        probabilities = answer(tile, INPUT_PX, BIASES["a"], 2)
        name = CLASSES[int(probabilities.argmax())]
        wanted[name] += times
        expected[name] += times * (np.array([*CONFIDENCE_EDGES, np.inf]) >= np.float32(probabilities.max()))
    assert sum(wanted.values()) == 12 + 36 * 4
    wait_until(lambda: server.predictions() == {n: predictions[n] + wanted[n] for n in CLASSES}, 10)
    edges = [*map(str, CONFIDENCE_EDGES), "+Inf"]

    def confidences_are_right() -> bool:
        more = {}
        for name in CLASSES:
            now = server.histogram("clotline_prediction_confidence", **{"class": name})
            more[name] = [now[le] - confidences[name][le] for le in edges]
        return more == {name: expected[name].tolist() for name in CLASSES}

    wait_until(confidences_are_right, 20)

    def counted_in_preprocessing() -> bool:  # each instance tells at its own time
        more = {
            reason: server.value("clotline_rejected_inputs_total", model="tile_preprocess", reason=reason)
            - before
            for reason, before in rejected.items()
        }
        count = server.value("clotline_decode_duration_seconds_count", model="tile_preprocess") - decoded
        return count == 156 and more == {reason: 4 if reason in bad else 0 for reason in rejected}

    wait_until(counted_in_preprocessing, 20)


@pytest.mark.parametrize("wanted", OUTPUTS)
def test_who_wants_one_output_only_is_counted_too(server: Server, wanted: str) -> None:
    server.ask_and_count(TILES, 3, outputs=[triton.InferRequestedOutput(wanted)], read=wanted)


def test_what_tiles_look_like_is_what_is_served(server: Server) -> None:
    told = scrape(server.addresses["metrics"])  # once: stubs tell what they counted a moment later
    for statistic in STATISTICS:
        labels = frozenset({"model": "tile_preprocess", "statistic": statistic}.items())
        count, total = (told[(f"clotline_tile_appearance_{what}", labels)] for what in ("count", "sum"))
        values = [appearance(decode_tile(tile, INPUT_PX))[statistic] for tile in TILES]
        assert count > 0
        assert min(values) - 1e-6 <= total / count <= max(values) + 1e-6


def test_questions_of_the_supervisor_are_answered_and_not_counted(server: Server) -> None:
    def answered() -> float:
        return server.value("nv_inference_request_success", model="tile_classifier", version="1")

    before, asked = server.predictions(), answered()
    wait_until(lambda: answered() >= asked + 2, 30)  # an idle model is asked every two seconds
    assert server.predictions() == before


def test_quantiles_of_latency_are_shown(server: Server) -> None:
    server.ask_and_count(TILES, 1)
    value = server.value(
        "nv_inference_request_summary_us", model="tile_classifier", version="1", quantile="0.95"
    )
    assert value > 0


def test_a_stub_that_is_killed_takes_nothing_of_the_others_with_it(server: Server) -> None:
    server.ask_and_count(TILES, 4)
    before = server.predictions()
    stub = next(
        s for s in stubs_of(victims(server.name)["tritonserver"]) if s.model.startswith("tile_network")
    )
    os.kill(stub.pid, signal.SIGKILL)

    def replaced() -> bool:
        key = ("clotline_model_replacements_total", frozenset({("model", "tile_network_onnx")}))
        return server.supervisor().get(key) == 1 and server.supervisor()[("clotline_ready", frozenset())] == 1

    wait_until(replaced, 60)
    assert server.predictions() == before
    server.ask_and_count(TILES[:1], 10)


def test_counters_go_on_over_releases_that_come_and_go(server: Server) -> None:
    """The third release unloads the first one, whose stubs are those that have counted most."""
    for number, name in ((2, "b"), (3, "c")):
        done = run_module("serving", "release", server.releases[name], "--name", server.name)
        assert done.returncode == 0, done.stderr
        server.ask_and_count(TILES, 6)
        release_id = json.loads((server.releases[name] / "release.json").read_text())["release_id"]
        wanted = {"model": "tile_classifier", "number": str(number), "release_id": release_id}
        wait_until(partial(server.is_told_to_serve, wanted), 15)
    models = {
        dict(labels)["model"]
        for name, labels in scrape(server.addresses["metrics"])
        if name.startswith("clotline")
    }
    assert models == {"tile_classifier", "tile_preprocess"}


def test_the_supervisor_tells_of_itself(server: Server) -> None:
    found = server.supervisor()
    assert found[("clotline_ready", frozenset())] == 1
    assert found[("clotline_model_ready", frozenset({("model", "tile_classifier")}))] == 1
    assert found[("clotline_server_restarts_total", frozenset())] == 0
    assert 20e6 < found[("clotline_memory_bytes", frozenset())] < 5e9
    switched_s = found[("clotline_release_switch_timestamp_seconds", frozenset())]
    live = json.loads((Path(state_of(server.name).repository).parent / "live.json").read_text())
    assert live["serving"]["number"] == 3
    assert switched_s == pytest.approx(np.datetime64(live["serving"]["since_utc"][:23]).astype(float) / 1e3)
    with urllib.request.urlopen(server.addresses["health"] + "/metrics", timeout=10) as got:
        assert got.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_without_metrics_there_are_answers_all_the_same(tmp_path: Path, launch: Launch) -> None:
    release = make_counted(tmp_path / "release", BIASES["a"])
    launched = launch(release / "models", "--name", "unmeasured", "--triton-arg=--allow-metrics=false")
    got = Server("unmeasured", launched.ready(), {}).ask(TILES)
    np.testing.assert_allclose(got, [answer(tile, INPUT_PX, BIASES["a"], 2) for tile in TILES], atol=1e-4)


class FaultyTriton:
    """Stands in for pb_utils of a Triton whose metrics break: the real one gives no way to break them without a crash."""

    def __init__(self, *, families: bool, increments: bool) -> None:
        self.families, self.increments = families, increments
        self.said: list[str] = []
        self.told: list[float] = []
        outer = self

        class MetricFamily:
            COUNTER = 0

            def __init__(self, **_: Any) -> None:
                if not outer.families:
                    raise RuntimeError("no family")

            def Metric(self, **_: Any) -> Any:
                return self

            def increment(self, more: float) -> None:
                if not outer.increments:
                    raise RuntimeError("no increment")
                outer.told.append(more)

        class Logger:
            log_warn = staticmethod(outer.said.append)

        self.MetricFamily, self.Logger = MetricFamily, Logger


@pytest.mark.parametrize("families", [True, False])
def test_a_problem_with_metrics_is_told_once_and_reaches_nobody(families: bool) -> None:
    triton_stub = FaultyTriton(families=families, increments=False)
    metrics = ModelMetrics(triton_stub, "model_0_0")
    count = metrics.count("clotline_x_total", "X", {})
    metrics.show()
    for _ in range(3):
        count.add()
        time.sleep(COUNTS_EVERY_S)
    assert len(triton_stub.said) == 1
    assert "model_0_0: metrics are incomplete, requests are not affected: RuntimeError" in triton_stub.said[0]
    triton_stub.increments = True
    metrics.close()
    assert triton_stub.told == ([3] if families else []), "what could not be told is told when it can be"


def test_a_network_whose_parameter_is_broken_does_not_load(tmp_path: Path, launch: Launch) -> None:
    release = make_counted(tmp_path / "release", BIASES["a"])
    path = release / "models" / "tile_network_onnx" / "config.pbtxt"
    path.write_text(path.read_text().replace("classes", "labels"))
    launched = launch(release / "models", "--name", "broken-parameter")
    assert launched.process.wait(90) == 1
    assert f"tile_network_onnx: {ANSWERS_FOR} must be" in launched.errors()
