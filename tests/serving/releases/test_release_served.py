"""Releases on a real tritonserver under load: no request fails, no answer is of two releases, and nothing bad gets through."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton

from exporters.release_manifest import load
from serving.benchmarks.releases import Load
from serving.benchmarks.tiny_release import answer, make_release, tiles, write_manifest
from serving.processes import processes_of
from serving.releases.bundle import read_bundle
from serving.releases.live import Live
from slides.spec import ModelSpec
from tests.conftest import export, run_module
from tests.serving.conftest import wait_until

ASKED = tiles(64)
INPUT_PX = {"a": 32, "b": 48, "c": 32}
BIAS = {"a": -1.0, "b": 1.0, "c": 2.0}
CLASSES = {"a": 2, "b": 2, "c": 3}
SLIDE_MODEL = '''
import json
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    """The mean over a bag of tiles, asked of the model that the parameter names."""
    def initialize(self, args):
        self.embedder = json.loads(args["model_config"])["parameters"]["embedder_model"]["string_value"]
    def execute(self, requests):
        return [self.respond(request) for request in requests]
    def respond(self, request):
        tiles = pb_utils.get_input_tensor_by_name(request, "tiles").as_numpy()
        ask = pb_utils.InferenceRequest(model_name=self.embedder, requested_output_names=["probabilities"],
                                        inputs=[pb_utils.Tensor("tile", tiles.reshape(-1, 1))])
        answer = ask.exec()
        if answer.has_error():
            return pb_utils.InferenceResponse(error=answer.error())
        mean = pb_utils.get_output_tensor_by_name(answer, "probabilities").as_numpy().mean(axis=0)
        return pb_utils.InferenceResponse([pb_utils.Tensor("probabilities", mean)])
'''
SLIDE_CONFIG = """
name: "slide_classifier" backend: "python" max_batch_size: 0
input { name: "tiles" data_type: TYPE_STRING dims: [ -1 ] }
output { name: "probabilities" data_type: TYPE_FP32 dims: [ 2 ] label_filename: "labels.txt" }
parameters { key: "embedder_model" value { string_value: "tile_classifier" } }
"""


class LiveServer:
    """A server on a live directory, which a test may start anew."""

    def __init__(self, directory: Path) -> None:
        self.live = Live(directory)
        self.name = f"releases-{os.getpid()}"

    def start(self, *arguments: str | Path) -> dict[str, Any]:
        ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        done = run_module(
            "serving",
            "up",
            "--live",
            self.live.directory,
            "--name",
            self.name,
            *ports,
            "--detach",
            *arguments,
        )
        assert done.returncode == 0, done.stderr
        self.addresses = json.loads(done.stdout.splitlines()[-1])
        return self.addresses

    def command(self, *arguments: str | Path) -> dict[str, Any]:
        done = run_module("serving", *arguments, "--name", self.name)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def refuses(self, *arguments: str | Path) -> tuple[int, str]:
        done = run_module("serving", *arguments, "--name", self.name)
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr.strip().splitlines()[-1]

    def ask(self, model: str = "tile_classifier") -> tuple[list[float], int]:
        client = triton.InferenceServerClient(self.addresses["http"], network_timeout=30)
        bag = model.startswith("slide")
        tensor = triton.InferInput("tiles" if bag else "tile", [1] if bag else [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([ASKED[0]], dtype=np.object_).reshape(tensor.shape()))
        result = client.infer(model, [tensor])
        client.close()
        return result.as_numpy("probabilities").reshape(-1).tolist(), int(
            result.get_response()["model_version"]
        )

    def loaded(self) -> set[str]:
        client = triton.InferenceServerClient(self.addresses["http"])
        state = json.loads((Path(self.addresses["log"]).parent / f"{self.name}.json").read_text())
        rows = client.get_model_repository_index(headers={"clotline-admin": state["admin_token"]})
        client.close()
        return {row["name"] for row in rows if row.get("state") == "READY"}


def expected(name: str) -> list[float]:
    return answer(ASKED[0], INPUT_PX[name], BIAS[name], CLASSES[name]).tolist()


@pytest.fixture(scope="module")
def releases(tiny_releases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny ones, `b` with a Python model for slides that asks its tile classifier."""
    b = shutil.copytree(tiny_releases["b"], tmp_path_factory.mktemp("with slides") / "b")
    model = b / "models" / "slide_classifier"
    (model / "1").mkdir(parents=True)
    (model / "1" / "model.py").write_text(SLIDE_MODEL)
    (model / "labels.txt").write_text("CE\nLAA\n")
    manifest = json.loads((b / "release.json").read_text())
    spec = ModelSpec.from_json(json.dumps(manifest["spec"]))
    (model / "config.pbtxt").write_text(SLIDE_CONFIG)
    classifiers = {
        **manifest["classifiers"],
        "slide_classifier": {"network": "slide_classifier", "format": "onnx"},
    }
    write_manifest(b, classifiers, spec)
    return {**tiny_releases, "b": b}


@pytest.fixture(scope="module")
def server(releases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    live_server = LiveServer(tmp_path_factory.mktemp("live server") / "live")
    live_server.start("--release", releases["a"])
    yield live_server
    run_module("serving", "down", "--name", live_server.name)


@pytest.fixture
def on_a(server: LiveServer, releases: dict[str, Path]) -> LiveServer:
    """The server, which serves `a`."""
    server.command("release", releases["a"])
    assert server.ask()[0] == pytest.approx(expected("a"), abs=1e-5)
    return server


def test_no_request_fails_and_each_answer_is_of_the_release_that_it_names(
    server: LiveServer, releases: dict[str, Path]
) -> None:
    load = Load(server.addresses["http"], server.addresses["grpc"], ASKED)
    load.start(4)
    names = {1: "a"}
    try:
        for command in (
            ["release", releases["b"]],
            ["rollback"],
            ["release", releases["c"]],
            ["rollback"],
            ["rollback"],
        ):
            told = server.command(*command)
            names[told["number"]] = next(
                n for n, path in releases.items() if read_bundle(path).release_id == told["release_id"]
            )
            assert told["drain_s"] is not None
            if names[told["number"]] == "b":
                assert told["public"] == ["slide_classifier", "tile_classifier", "tile_classifier_second"]
                assert told["largest_difference"]["tile_classifier"] < 1e-5
                for model in told["public"]:
                    probabilities, version = server.ask(model)
                    assert probabilities == pytest.approx(expected("b"), abs=1e-5)
                    assert version == told["number"]
    finally:
        load.end()
    assert names == {1: "a", 2: "b", 3: "c"}
    assert load.failures == []
    assert {version for *_, version, _ in load.answers} == {1, 2, 3}
    for _, _, turn, version, first in load.answers:
        name = names[version]
        assert abs(answer(ASKED[turn], INPUT_PX[name], BIAS[name], CLASSES[name])[0] - first) < 1e-5
    # `b` went when `c` came: nothing of it is left, the model that only it had included.
    assert not any("slide" in name or "second" in name or name.endswith("__r2") for name in server.loaded())
    assert sorted(server.loaded()) == sorted(path.name for path in server.live.models.iterdir())
    # No model of a release was loaded twice, whatever its stubs wrote.
    loads = Counter(re.findall(r"loading: (\S+__r[0-9]+):1", Path(server.addresses["log"]).read_text()))
    assert set(loads.values()) == {1}
    status = run_module("serving", "status")
    row = next(r for r in json.loads(status.stdout.splitlines()[-1])["servers"] if r["name"] == server.name)
    assert (row["release"]["serving"]["number"], row["release"]["resident"]["number"]) == (3, 1)


def remake(release: Path, target: Path, path: str, change: Callable[[bytes], bytes]) -> Path:
    """A copy of a release with one file changed, and a manifest that fits to it."""
    shutil.copytree(release, target)
    (target / path).write_bytes(change((target / path).read_bytes()))
    manifest = json.loads((target / "release.json").read_text())
    write_manifest(target, manifest["classifiers"], ModelSpec.from_json(json.dumps(manifest["spec"])))
    return target


NETWORK, PREPROCESS = "models/tile_network_onnx", "models/tile_preprocess"
BAD = {
    "truncated": (f"{NETWORK}/1/model.onnx", lambda data: data[: len(data) // 2], "cannot load"),
    "other backend": (f"{NETWORK}/config.pbtxt", lambda data: data.replace(b"onnxruntime", b"nothing"), "nothing"),
    "setting": (f"{NETWORK}/config.pbtxt", lambda data: data.replace(b"intra_op_thread", b"thread"), "unknown parameter"),
    "python": (f"{PREPROCESS}/1/model.py", lambda data: b"raise RuntimeError('never runs')", "never runs"),
    "answers": ("golden/golden.json", lambda data: data.replace(b'"probabilities": [0.', b'"probabilities": [0.0'), "apart"),
    "steps": ("models/tile_classifier/config.pbtxt", lambda data: data.replace(b'"tile_preprocess"', b'"gone"'), "gone"),
    "no config": ("models/tile_classifier/config.pbtxt", lambda data: b"platform {", "no Triton model configuration"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_release_that_fails_leaves_the_server_as_it_was(
    fault: str, server: LiveServer, releases: dict[str, Path], tmp_path: Path
) -> None:
    path, change, says = BAD[fault]
    bad = remake(releases["c"], tmp_path / "bad", path, change)
    before = server.ask(), server.loaded(), sorted(p.name for p in server.live.models.iterdir())
    code, error = server.refuses("release", bad)
    assert code == (2 if fault in ("steps", "no config") else 1)
    assert error.startswith("error: ")
    assert says in error
    assert (server.ask(), server.loaded(), sorted(p.name for p in server.live.models.iterdir())) == before
    events = [
        json.loads(line)["event"]
        for line in (server.live.directory / "journal.jsonl").read_text().splitlines()
    ]
    assert "refused" in events[-2:]


KILLING = """
import os, signal, sys
from serving.releases import switching
from serving.releases.live import Live
from serving.releases.server import Server
from serving.__main__ import COMMANDS, main

def deadly(owner, name, nth, after):
    real, left = getattr(owner, name), [nth]
    def wrapped(*arguments, **options):
        left[0] -= 1
        if left[0] == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, wrapped)

where, nth, after = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "after"
deadly(*{"load": (Server, "load"), "unload": (Server, "unload"), "point": (switching, "_point")}[where], nth, after)
main("", COMMANDS, sys.argv[4:])
"""


@pytest.mark.parametrize(
    ("where", "nth", "after", "moved"),
    [
        pytest.param("load", 2, "before", False, id="half loaded"),
        pytest.param("point", 1, "after", False, id="public models written, server not told"),
        pytest.param("load", 4, "after", True, id="server moved, not noted"),
        pytest.param("unload", 1, "after", True, id="dropping the release before the one before"),
    ],
)
def test_a_killed_release_leaves_one_whole_release_and_the_next_command_cleans_up(
    where: str, nth: int, after: str, moved: bool, on_a: LiveServer, releases: dict[str, Path], tmp_path: Path
) -> None:
    bias = 3.0 + nth
    new = make_release(tmp_path / "new", bias=bias)
    arguments = ["release", str(new), "--name", on_a.name]
    killed = subprocess.run(
        [sys.executable, "-c", KILLING, where, str(nth), after, *arguments], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    answers = answer(ASKED[0], 32, bias, 2).tolist() if moved else expected("a")
    assert on_a.ask()[0] == pytest.approx(answers, abs=1e-5)
    told = on_a.command(
        "release", new if moved else releases["a"]
    )  # which serves, so there is only to clean up
    assert told["changed"] is False
    assert on_a.ask() == (pytest.approx(answers, abs=1e-5), told["number"])
    assert sorted(on_a.loaded()) == sorted(path.name for path in on_a.live.models.iterdir())
    state = on_a.live.read()
    assert {int(name.rpartition("__r")[2]) for name in on_a.loaded() if "__r" in name} == state.numbers


def test_one_release_at_a_time(on_a: LiveServer, releases: dict[str, Path]) -> None:
    with on_a.live.hold("anna@here"):
        code, error = on_a.refuses("release", releases["b"])
    assert (code, "held by anna@here" in error) == (1, True)


def test_a_live_directory_has_one_server(server: LiveServer) -> None:
    done = run_module(
        "serving", "up", "--live", server.live.directory, "--http-port", "0", "--grpc-port", "0"
    )
    assert done.returncode == 2
    assert f"serves {server.name} already" in done.stderr


def test_an_interrupted_release_is_undone(on_a: LiveServer, tmp_path: Path) -> None:
    new = make_release(tmp_path / "new", bias=9.0)
    before = on_a.loaded()
    command = [sys.executable, "-m", "serving", "release", str(new), "--name", on_a.name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = on_a.live.directory / "journal.jsonl"
    wait_until(lambda: '"staged"' in journal.read_text().splitlines()[-1], 30)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, ""), errors
    assert on_a.loaded() == before
    assert sorted(before) == sorted(path.name for path in on_a.live.models.iterdir())


def test_the_same_release_serves_after_a_restart(server: LiveServer, releases: dict[str, Path]) -> None:
    server.command("release", releases["a"])
    before = server.ask()
    state = json.loads((Path(server.addresses["log"]).parent / f"{server.name}.json").read_text())
    assert run_module("serving", "down", "--name", server.name).returncode == 0
    assert processes_of(state["instance_id"]) == []
    server.start()
    assert server.ask() == before
    assert server.command("rollback")["changed"] is True


def test_bad_usage_is_told(server: LiveServer, releases: dict[str, Path], tmp_path: Path) -> None:
    for arguments, code, says in (
        (["release", tmp_path / "nothing"], 2, "is no release"),
        (["release", releases["a"], "--drain-s", "-1"], 2, "seconds above 0"),
        (["rollback", "--live", tmp_path / "live"], 2, "not allowed with"),
    ):
        got, error = server.refuses(*arguments)
        assert (got, says in error) == (code, True), error
    done = run_module("serving", "release", releases["a"], "--name", "nobody")
    assert done.stderr.startswith("error: no server named nobody")


def test_what_the_exporter_writes_is_released(
    on_a: LiveServer, untrained_checkpoint: Path, tmp_path: Path
) -> None:
    export(untrained_checkpoint, "--release", tmp_path / "release", "--formats", "onnx")
    told = on_a.command("release", tmp_path / "release", "--reason", "a real one")
    assert told["release_id"] == load(tmp_path / "release").release_id
    assert "tile_classifier" in told["public"]
    assert max(told["largest_difference"].values()) < 1e-4
    assert on_a.ask()[1] == told["number"]
    if "slide_classifier" in told["public"]:
        assert on_a.ask("slide_classifier")[1] == told["number"]
    assert on_a.command("rollback")["number"] != told["number"]
    assert on_a.ask()[0] == pytest.approx(expected("a"), abs=1e-5)
