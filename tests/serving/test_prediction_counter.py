"""Predictions of networks whose backend counts nothing: a live directory made for native backends, on a real tritonserver.

No native backend of networks is in the embedded server, so the directory is made as for a server that has one, and served by
ours: the network counts nothing then, because the parameter that tells it to has moved to the counter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.grpc import model_config_pb2

from serving.benchmarks.tiny_release import answer, write_manifest
from serving.instances import instances
from serving.releases import counting
from serving.releases.configs import CONFIG, read_config
from serving.releases.errors import BadRelease
from serving.releases.preparing import prepare
from serving.releases.server import Server as Controlled
from serving.tritonserver import TritonServer, counting_backends
from slides.model_metrics import ANSWERS_FOR, PROBE_ID
from slides.spec import ModelSpec
from tests.conftest import run_module
from tests.serving.conftest import wait_until
from tests.serving.test_launcher import state_of
from tests.serving.test_metrics import (
    BIASES,
    CLASSES,
    INPUT_PX,
    OUTPUTS,
    TILES,
    Server,
    counted_server,
    make_counted,
)

COUNTER = "tile_network_onnx_counter"


def native(directory: Path) -> TritonServer:
    """A server that has an `onnxruntime` of its own."""
    for backend in ("python", "onnxruntime"):
        (directory / backend).mkdir(parents=True)
    return TritonServer(directory / "tritonserver", directory, None)


def config_of(directory: Path) -> model_config_pb2.ModelConfig:
    return read_config(directory / CONFIG)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("a counter")
    releases = {name: make_counted(top / name, BIASES[name]) for name in "ab"}
    prepare(top / "live", releases["a"], tritonserver=native(top / "native"))
    with counted_server(f"counter-{os.getpid()}", top / "live", releases) as up:
        yield up


def test_the_ensemble_ends_in_the_counter_and_the_network_counts_nothing(server: Server) -> None:
    models = Path(state_of(server.name).repository)
    assert ANSWERS_FOR not in config_of(models / "tile_network_onnx__r1").parameters
    assert ANSWERS_FOR in config_of(models / f"{COUNTER}__r1").parameters
    for public in ("tile_classifier", "tile_classifier__r1"):
        steps = [step.model_name for step in config_of(models / public).ensemble_scheduling.step]
        assert steps == ["tile_preprocess__r1", "tile_network_onnx__r1", f"{COUNTER}__r1"]


def test_every_answer_is_right_and_counted_once(server: Server) -> None:
    before = server.predictions()
    wanted = np.array([answer(tile, INPUT_PX, BIASES["a"], len(CLASSES)) for tile in TILES])

    def ask(number: int) -> None:
        if number % 4 == 3:
            with pytest.raises(triton.InferenceServerException, match=r"tile 0 of 1: .* is no image"):
                server.ask([b"this is none"])
            return
        first = number % len(TILES)
        np.testing.assert_allclose(server.ask(TILES[first:]), wanted[first:], atol=1e-4)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(ask, range(60)))
    counted = dict(before)
    for number in range(60):
        for row in wanted[number % len(TILES) :] if number % 4 != 3 else ():
            counted[CLASSES[int(row.argmax())]] += 1
    wait_until(lambda: server.predictions() == counted, 15)


@pytest.mark.parametrize("wanted", OUTPUTS)
def test_who_wants_one_output_is_counted_too(server: Server, wanted: str) -> None:
    server.ask_and_count(TILES, 3, outputs=[triton.InferRequestedOutput(wanted)], read=wanted)


def test_a_check_is_answered_and_not_counted(server: Server) -> None:
    before = server.predictions()
    for _ in range(3):
        assert len(server.ask(TILES, request_id=PROBE_ID)) == len(TILES)
    server.ask_and_count(TILES[:1], 2)
    assert sum(server.predictions().values()) == sum(before.values()) + 2


def test_a_release_on_a_server_that_counts_gets_none_and_the_counts_go_on(server: Server) -> None:
    done = run_module("serving", "release", server.releases["b"], "--name", server.name)
    assert done.returncode == 0, done.stderr
    models = Path(state_of(server.name).repository)
    assert not (models / f"{COUNTER}__r2").exists()
    server.ask_and_count(TILES, 5)
    assert run_module("serving", "rollback", "--name", server.name).returncode == 0
    server.ask_and_count(TILES, 5)


def test_a_running_server_says_which_backends_count(server: Server) -> None:
    state = state_of(server.name)
    assert state in instances(Path(state.log).parent.parent)
    with Controlled(state, timeout_s=10) as controlled:
        assert controlled.counting_backends == {"onnxruntime", "openvino", "pytorch"}


def test_native_backends_do_not_count(tmp_path: Path) -> None:
    assert counting_backends(native(tmp_path)) == {"openvino", "pytorch"}


def test_it_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(counting.SWITCH_VARIABLE, "off")
    release = make_counted(tmp_path / "release", BIASES["a"])
    models = prepare(tmp_path / "live", release, tritonserver=native(tmp_path / "native"))
    assert not list(models.glob("*counter*"))
    assert ANSWERS_FOR in config_of(models / "tile_network_onnx__r1").parameters


def test_two_classifiers_over_one_network_share_its_counter(tmp_path: Path) -> None:
    models = make_counted(tmp_path / "release", BIASES["a"]) / "models"
    found = {entry.name: config_of(entry) for entry in models.iterdir()}
    found["tile_classifier_onnx"] = model_config_pb2.ModelConfig()
    found["tile_classifier_onnx"].CopyFrom(found["tile_classifier"])
    found["tile_classifier_onnx"].name = "tile_classifier_onnx"
    counting.add_counters(models, found, counting_backends=())
    assert [name for name in found if name.endswith("_counter")] == [COUNTER]
    for public in ("tile_classifier", "tile_classifier_onnx"):
        *_, network, counter = found[public].ensemble_scheduling.step
        assert sorted(network.output_map.values()) == sorted(counter.input_map.values())
        assert dict(counter.output_map) == {name: name for name in OUTPUTS}


def test_a_release_with_a_model_of_that_name_is_refused(tmp_path: Path) -> None:
    release = make_counted(tmp_path / "release", BIASES["a"])
    model = release / "models" / COUNTER
    model.mkdir()
    (model / "config.pbtxt").write_text('platform: "ensemble"')
    spec = ModelSpec.from_json(json.dumps(json.loads((release / "release.json").read_text())["spec"]))
    write_manifest(release, {"tile_classifier": {"network": "tile_network_onnx", "format": "onnx"}}, spec)
    with pytest.raises(BadRelease, match=COUNTER):
        prepare(tmp_path / "live", release, tritonserver=native(tmp_path / "native"))
