"""The gate through a real tritonserver: what it proves, what it leaves out, and that nothing of it stays."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from exporters import proving_server as module
from exporters.comparison_tiles import ComparisonTiles, comparison_tiles
from exporters.conformance import stage_classifier
from exporters.errors import GoldenTilesError, ParityError, ServedError, UnavailableError
from exporters.formats import formats_named
from exporters.formats.interface import Answer, Network
from exporters.parity import reference_answer
from exporters.proving_server import PROTOCOLS, ProvingServer, proving_server, unservable_here
from exporters.publication import Publication
from exporters.served_parity import check_served_on, tile_tensor
from exporters.serving_options import ServingOptions
from exporters.target_repository import stage_preprocess
from training.checkpoint import Checkpoint

MAX_BATCH = 4
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiles(loaded: Checkpoint) -> ComparisonTiles:
    return comparison_tiles(loaded, None)


@pytest.fixture(scope="module")
def expected(loaded: Checkpoint, tiles: ComparisonTiles) -> Answer:
    return reference_answer(loaded.model, tiles.tiles_NHWC)


@pytest.fixture(scope="module")
def models(
    loaded: Checkpoint, network_of: Network, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Staged model directories: `first` (ONNX), `second` (TorchScript), and one that no server could load."""
    repository = tmp_path_factory.mktemp("served parity") / "my models"
    repository.mkdir()
    options = ServingOptions(max_batch=MAX_BATCH, instances=1)
    with Publication(repository) as publication:
        version = stage_preprocess(publication, repository, loaded.spec.input_size_px, options)
        for name, fmt in zip(("first", "second"), formats_named(["onnx", "torchscript"]), strict=True):
            files = fmt.build(network_of).files
            stage_classifier(publication, name, fmt, files, loaded.spec, options, preprocess_version=version)
        publication.stage("not_asked_for/config.pbtxt", b'backend: "of nobody"')
        yield publication.root


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[ProvingServer]:
    with proving_server(models, ["first", "second"], announce=lambda _: None) as up:
        yield up


def test_both_protocols_are_proven_at_every_batch(
    server: ProvingServer, tiles: ComparisonTiles, expected: Answer, loaded: Checkpoint
) -> None:
    onnx, torchscript = formats_named(["onnx", "torchscript"])
    told: list[str] = []
    proven = check_served_on(
        server, {"first": onnx, "second": torchscript}, tiles, expected,
        spec=loaded.spec, max_batch=MAX_BATCH, announce=told.append,
    )  # fmt: skip
    assert set(proven) == {"first", "second"}
    for measured in proven.values():
        for parity in (measured.http, measured.grpc):
            assert parity.batches == (1, 2, MAX_BATCH)
            assert parity.tiles == 6
            assert parity.max_abs_diff <= 1e-5
            assert parity.patient_auc is not None
    assert any(line.startswith("first over http: batch 1") for line in told)


def test_another_answer_is_stopped_and_measured(
    server: ProvingServer, tiles: ComparisonTiles, expected: Answer, loaded: Checkpoint
) -> None:
    (onnx,) = formats_named(["onnx"])
    moved = expected._replace(probabilities=expected.probabilities[:, ::-1].copy())
    with pytest.raises(
        ParityError, match=r"onnx: first over http: batch 1, tiles 0 to 0: probabilities"
    ) as caught:
        check_served_on(server, {"first": onnx}, tiles, moved, spec=loaded.spec, max_batch=MAX_BATCH)
    assert caught.value.measured is not None
    assert caught.value.measured.batches == (1, 2, MAX_BATCH)


def test_a_lower_precision_needs_as_many_tiles_as_in_process(
    server: ProvingServer, tiles: ComparisonTiles, expected: Answer, loaded: Checkpoint
) -> None:
    (int8,) = formats_named(["onnx-int8"])
    with pytest.raises(GoldenTilesError, match="at least 32 tiles, there are 6"):
        check_served_on(server, {"first": int8}, tiles, expected, spec=loaded.spec, max_batch=MAX_BATCH)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_the_server_refuses_is_told_in_its_words(
    protocol: str, server: ProvingServer, tiles: ComparisonTiles
) -> None:
    one = {"tile": tile_tensor(tiles.encoded[:1])}
    with pytest.raises(ParityError, match=f"no_such_model over {protocol}: .*unknown model"):
        server.ask(protocol, "no_such_model", one, ["probabilities"])
    with pytest.raises(ParityError, match=f"first over {protocol}: .*confidense"):
        server.ask(protocol, "first", one, ["confidense"])
    too_many = {"tile": tile_tensor([tiles.encoded[0]] * (MAX_BATCH + 1))}
    with pytest.raises(ParityError, match=rf"batch-size must be <= {MAX_BATCH}"):
        server.ask(protocol, "first", too_many, ["probabilities"])
    answered = server.ask(protocol, "first", one, ["probabilities"])
    assert answered["probabilities"].shape == (1, 2)


def test_what_the_server_cannot_load_is_told_with_the_reason() -> None:
    tensorrt, aoti = formats_named(["tensorrt", "torch-aoti"])
    assert "no backend tensorrt" in str(unservable_here(tensorrt))
    assert "no torch_aoti" in str(unservable_here(aoti))


def test_a_model_that_was_not_staged_is_named(models: Path) -> None:
    with (
        pytest.raises(ServedError, match=r"third/config\.pbtxt cannot be read"),
        proving_server(models, ["third"], announce=lambda _: None),
    ):
        pass


def test_without_a_tritonserver_it_says_what_to_do(
    models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CLOTLINE_TRITON_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    (onnx,) = formats_named(["onnx"])
    with pytest.raises(UnavailableError, match=r"python -m serving install.*--without-server"):
        unservable_here(onnx)
    with pytest.raises(UnavailableError), proving_server(models, ["first"], announce=lambda _: None):
        pass


EXPORTER = """
import sys
from pathlib import Path
from exporters.proving_server import proving_server
def say(text): print(text, flush=True)
try:
    with proving_server(Path(sys.argv[1]), ["tile_preprocess"], announce=say) as server:
        say(f"up {server._launcher.pid} {server._addresses['http']}")
        sys.stdin.read()
except KeyboardInterrupt:
    say("interrupted")
"""


def start(models: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", EXPORTER, str(models)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def listens(address: str) -> bool:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def wait_until(condition: object, seconds: float = 40.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_server_ends_with_an_exporter_that_is_killed(models: Path) -> None:
    exporter = start(models)
    assert exporter.stdout
    assert "loads 1 models" in exporter.stdout.readline()
    _, launcher, address = exporter.stdout.readline().split()
    assert listens(address)
    exporter.kill()
    exporter.communicate()
    wait_until(lambda: not exists(int(launcher)) and not listens(address))


def test_an_interrupt_while_the_server_starts_leaves_nothing(models: Path) -> None:
    exporter = start(models)
    assert exporter.stdout
    assert "loads 1 models" in exporter.stdout.readline()
    children = Path(f"/proc/{exporter.pid}/task/{exporter.pid}/children")
    wait_until(lambda: children.read_text().strip())
    (launcher,) = map(int, children.read_text().split())
    time.sleep(0.3)
    exporter.send_signal(signal.SIGINT)
    out, _ = exporter.communicate(timeout=60)
    assert out.splitlines()[-1] == "interrupted"
    wait_until(lambda: not exists(launcher))


def test_a_server_that_dies_meanwhile_is_told(models: Path, tiles: ComparisonTiles) -> None:
    with proving_server(models, ["tile_preprocess"], announce=lambda _: None) as server:
        one = {"tile": tile_tensor(tiles.encoded[:1])}
        assert server.ask("grpc", "tile_preprocess", one, ["tiles"])["tiles"].dtype == np.uint8
        launcher = server._launcher
        launcher.terminate()
        launcher.wait(60)
        with pytest.raises(ServedError, match="tritonserver of the gate is gone"):
            server.ask("http", "tile_preprocess", one, ["tiles"])


def test_the_backends_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    unservable_here(formats_named(["onnx"])[0])
    monkeypatch.setattr(module.subprocess, "run", lambda *a, **b: pytest.fail("asked again"))
    assert unservable_here(formats_named(["openvino"])[0]) is None
