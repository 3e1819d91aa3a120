"""A release: what it holds, what it says, what is refused, and that the same checkpoint gives the same bytes."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters import release
from exporters.__main__ import main
from exporters.errors import ParityError, ReleaseExistsError
from exporters.formats.interface import Artifact, Network, ServedFormat
from exporters.formats.onnx import Onnx
from exporters.formats.torchscript import TorchScript
from exporters.golden import read_golden
from exporters.release import export_release
from exporters.release_manifest import load
from exporters.release_place import hold_release
from exporters.triton_config import NetworkTensors, from_text
from exporters.verify import verify
from slides.decode import decode_tile
from training.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[2]


def contents(directory: Path, *below: str) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for name in below
        for path in sorted((directory / name).rglob("*"))
        if path.is_file()
    }


def test_it_holds_all_that_serving_needs(release_dir: Path, loaded: Checkpoint) -> None:
    manifest = verify(release_dir)
    assert manifest.kind == "tile"
    assert sorted(path.name for path in release_dir.iterdir()) == [
        "MODEL_CARD.md", "golden", "models", "plots", "release.json",
    ]  # fmt: skip
    assert manifest.classifiers["tile_classifier"].network == "tile_network_onnx"
    assert manifest.classifiers["tile_classifier_torchscript"].format == "torchscript"
    assert manifest.classifiers["slide_classifier"].parts is not None
    for model in (release_dir / "models").iterdir():
        assert [entry.name for entry in model.iterdir() if entry.is_dir()] == ["1"]
        config = from_text((model / "config.pbtxt").read_text(), origin=model.name)
        assert all(step.model_version == 1 for step in config.ensemble_scheduling.step)
    assert manifest.spec == loaded.spec.as_dict()
    assert manifest.checkpoint["weights_sha256"] == loaded.manifest["weights_sha256"]
    assert manifest.checkpoint["data"]["fingerprint"] == "0" * 64
    assert "held_out_patients" not in manifest.checkpoint["data"]  # their names stay at home
    assert manifest.onnx == {"opset": 18, "ir_version": 10}
    assert manifest.tolerances["fp32"]["max_abs_diff"] == 1e-4
    assert {"python", "torch", "onnx", "onnxruntime"} <= manifest.versions.keys()
    onnx = manifest.formats["onnx"]
    assert onnx.status == "accepted"
    assert onnx.parity.in_process is not None
    assert onnx.parity.in_process["batches"] == [1, 2, 8]
    assert onnx.parity.served is None
    assert onnx.parity.not_served_because == "asked for with --without-server"
    assert onnx.files == {"model.onnx": manifest.files["models/tile_network_onnx/1/model.onnx"].sha256}


def test_golden_tiles_travel_with_what_pytorch_answers(release_dir: Path, loaded: Checkpoint) -> None:
    golden = read_golden(release_dir / "golden")
    assert (golden["kind"], golden["class_names"]) == ("tile", ["CE", "LAA"])
    assert [item["label"] for item in golden["items"]] == [tile.label for tile in loaded.golden_tiles]
    (run,) = [TorchScript().open(release_dir / "models/tile_network_torchscript/1/model.pt")]
    for item, tile in zip(golden["items"], loaded.golden_tiles, strict=True):
        data = (release_dir / "golden" / item["path"]).read_bytes()
        assert data == tile.data
        answered = run(decode_tile(data, loaded.spec.input_size_px)[None]).probabilities
        np.testing.assert_allclose(answered[0], item["probabilities"], atol=1e-5)


def test_the_same_checkpoint_gives_the_same_bytes(
    release_dir: Path, checkpoint_dir: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    command = [sys.executable, "-m", "exporters", "export", str(checkpoint_dir), "--release", str(again)]
    command += ["--formats", "onnx,torchscript", "--without-server"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert contents(again, "models", "golden") == contents(release_dir, "models", "golden")
    document = json.loads(done.stdout)
    assert document["release_id"] == load(release_dir).release_id
    assert document["release"] == str(again)
    assert "NOT PROVEN THROUGH A SERVER" in done.stderr
    assert "Warning" not in done.stderr


class WithoutNormalisation(TorchScript):
    """Answers otherwise than PyTorch."""

    name = "openvino"

    def build(self, network: Network) -> Artifact:
        return super().build(dataclasses.replace(network, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))


class Unbuildable(TorchScript):
    """Cannot be written."""

    name = "torch-aoti"

    def build(self, network: Network) -> Artifact:
        from exporters.errors import GraphError

        raise GraphError("An operator is missing. Nothing was published.")


class Miswired(TorchScript):
    """Is right in this process; in the server confidence and label are each other's."""

    name = "openvino"

    def tensors_of(self, outputs: Any, input: str = "tiles") -> NetworkTensors:
        right = super().tensors_of(outputs)
        return NetworkTensors(right.input, ("probabilities__0", "confidence__2", "label_index__1"))


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def use(*formats: ServedFormat) -> None:
        monkeypatch.setattr(release, "formats_named", lambda names: list(formats))

    return use


def test_a_refused_further_format_is_listed_and_not_published(
    checkpoint_dir: Path, tmp_path: Path, formats: Callable[..., None]
) -> None:
    formats(TorchScript(), Unbuildable(), WithoutNormalisation())
    export_release(checkpoint_dir, tmp_path / "release", ["any"], served=False)
    manifest = verify(tmp_path / "release")
    assert {name: entry.status for name, entry in manifest.formats.items()} == {
        "torchscript": "accepted",
        "torch-aoti": "refused",
        "openvino": "refused",
    }
    refused = manifest.formats["openvino"]
    assert refused.reasons[0].startswith("openvino: batch 1")
    assert "Nothing was published" not in refused.reasons[0]
    assert refused.parity.in_process is not None
    assert refused.parity.in_process["max_abs_diff"] > 1e-4
    assert refused.speed is not None
    assert (manifest.formats["torch-aoti"].files, manifest.formats["torch-aoti"].bytes) == ({}, 0)
    assert not any("openvino" in path or "aoti" in path for path in manifest.files)
    card = (tmp_path / "release/MODEL_CARD.md").read_text()
    assert "`openvino` is **refused** and not published" in card


@pytest.mark.parametrize("strict", [True, False])
def test_a_refused_first_format_or_any_with_strict_publishes_nothing(
    strict: bool, checkpoint_dir: Path, tmp_path: Path, formats: Callable[..., None]
) -> None:
    faulty, right = WithoutNormalisation(), TorchScript()
    formats(*([right, faulty] if strict else [faulty, right]))
    with pytest.raises(ParityError, match="Nothing was published"):
        export_release(checkpoint_dir, tmp_path / "release", ["any"], served=False, strict=strict)
    assert list(tmp_path.iterdir()) == []


def test_through_a_server(checkpoint_dir: Path, tmp_path: Path, formats: Callable[..., None]) -> None:
    formats(Onnx(), Miswired())
    export_release(checkpoint_dir, tmp_path / "release", ["any"])
    manifest = verify(tmp_path / "release")
    onnx, miswired = manifest.formats["onnx"], manifest.formats["openvino"]
    assert onnx.parity.served is not None
    for protocol in ("http", "grpc"):
        assert onnx.parity.served[protocol]["max_abs_diff"] <= 1e-4
        assert onnx.parity.served[protocol]["batches"] == [1, 2, 8]
    slides = manifest.classifiers["slide_classifier"].served
    assert slides is not None
    assert slides["grpc"]["label_flips"] == 0
    assert miswired.status == "refused"
    assert miswired.parity.in_process is not None  # it was right here
    assert not any("openvino" in path for path in manifest.files)
    assert set(manifest.classifiers) == {"tile_classifier", "slide_classifier"}
    assert "NOT PROVEN" not in (tmp_path / "release/MODEL_CARD.md").read_text()


def test_what_is_there_and_what_is_busy(
    checkpoint_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    with pytest.raises(ReleaseExistsError):
        export_release(checkpoint_dir, there, ["onnx"], served=False)
    assert main(["export", str(checkpoint_dir), "--release", str(there)]) == 2
    assert "exists already" in capsys.readouterr().err
    busy = tmp_path / "busy"
    with hold_release(busy):
        assert main(["export", str(checkpoint_dir), "--release", str(busy)]) == 1
    assert "Another export is writing" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_an_interrupt_leaves_nothing(checkpoint_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "release"
    command = [sys.executable, "-m", "exporters", "export", str(checkpoint_dir), "--release", str(directory)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        deadline_s = time.monotonic() + 100
        while not list(tmp_path.glob(".release.partial-*/.models.export-*/new/tile_preprocess/1/*")):
            assert time.monotonic() < deadline_s
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
