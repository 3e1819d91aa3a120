"""From a checkpoint to a repository, and every way in which that must not half-happen."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from exporters import release
from exporters.errors import FormatError, ParityError, RepositoryBusyError, RepositoryError
from exporters.formats.interface import Artifact, Network
from exporters.formats.torchscript import TorchScript
from exporters.publication import hold_repository
from exporters.release import ServingOptions
from exporters.triton_config import ModelConfig, from_text
from slides.spec import ModelSpec
from training.checkpoint import Checkpoint
from training.errors import CheckpointError, CheckpointVersionError

Snapshot = Callable[[Path], dict[str, str]]
# What a tritonserver answers is proven in test_release_directory.py; here is what becomes of files.
export_checkpoint = functools.partial(release.export_checkpoint, served=False)


def config(repository: Path, model: str) -> ModelConfig:
    return from_text((repository / model / "config.pbtxt").read_text(), origin=model)


def pins(repository: Path, model: str) -> dict[str, int]:
    return {
        step.model_name: step.model_version for step in config(repository, model).ensemble_scheduling.step
    }


@pytest.fixture(scope="module")
def first(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> release.Release:
    """One export of both formats; tests that write copy it."""
    repository = tmp_path_factory.mktemp("first") / "a model repository"
    return export_checkpoint(checkpoint_dir, repository, ["onnx", "torchscript"])


@pytest.fixture
def repository(first: release.Release, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first.repository, tmp_path / "models"))


def test_a_release_holds_both_formats(first: release.Release, loaded: Checkpoint) -> None:
    files = sorted(str(p.relative_to(first.repository)) for p in first.repository.rglob("*") if p.is_file())
    assert files == [
        "tile_classifier/1/release.json",
        "tile_classifier/config.pbtxt",
        "tile_classifier/labels.txt",
        "tile_classifier_torchscript/1/release.json",
        "tile_classifier_torchscript/config.pbtxt",
        "tile_classifier_torchscript/labels.txt",
        "tile_network_onnx/1/model.onnx",
        "tile_network_onnx/config.pbtxt",
        "tile_network_onnx/labels.txt",
        "tile_network_torchscript/1/model.pt",
        "tile_network_torchscript/config.pbtxt",
        "tile_network_torchscript/labels.txt",
        "tile_preprocess/1/model.py",
        "tile_preprocess/config.pbtxt",
    ]
    assert [path.name for path in first.repository.parent.iterdir()] == [first.repository.name]
    assert pins(first.repository, "tile_classifier") == {"tile_preprocess": 1, "tile_network_onnx": 1}
    assert pins(first.repository, "tile_classifier_torchscript") == {
        "tile_preprocess": 1,
        "tile_network_torchscript": 1,
    }
    parameters = config(first.repository, "tile_classifier").parameters
    assert ModelSpec.from_json(parameters["clotline_spec"].string_value) == loaded.spec
    origin = json.loads(parameters["clotline_checkpoint"].string_value)
    assert origin == {
        "weights_sha256": loaded.manifest["weights_sha256"],
        "git_commit": "0" * 40,
        "architecture": "squeezenet1_1",
        "format": "onnx",
    }
    assert {name: exported.parity.batches for name, exported in first.formats.items()} == {
        "onnx": (1, 2, 8),
        "torchscript": (1, 2, 8),
    }
    assert max(exported.parity.max_abs_diff for exported in first.formats.values()) <= 1e-5


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_published_file_answers_any_batch(first: release.Release, loaded: Checkpoint, batch: int) -> None:
    session = onnxruntime.InferenceSession(str(first.repository / "tile_network_onnx/1/model.onnx"))
    size_px = loaded.spec.input_size_px
    tiles = np.random.default_rng(0).integers(0, 256, (batch, size_px, size_px, 3), dtype=np.uint8)
    probabilities, confidence, label_index = map(np.asarray, session.run(None, {"tiles": tiles}))
    assert probabilities.shape == (batch, 2)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(confidence[:, 0], probabilities.max(axis=1))
    np.testing.assert_array_equal(label_index[:, 0], probabilities.argmax(axis=1))


def test_an_export_again_is_the_next_version_and_all_ensembles_of_its_format_pin_it(
    repository: Path, checkpoint_dir: Path
) -> None:
    second = export_checkpoint(checkpoint_dir, repository, ["torchscript"], ServingOptions(versions_loaded=2))
    assert second.version == 2
    assert pins(repository, "tile_classifier") == {"tile_preprocess": 1, "tile_network_torchscript": 2}
    assert pins(repository, "tile_classifier_torchscript") == {
        "tile_preprocess": 1,
        "tile_network_torchscript": 2,
    }
    assert (repository / "tile_network_torchscript/1/model.pt").exists()  # for a rollback
    assert (repository / "tile_classifier/2/release.json").exists()
    assert config(repository, "tile_network_torchscript").version_policy.latest.num_versions == 2


def test_a_version_of_another_shape_is_not_kept_loaded(
    repository: Path, make_checkpoint: Callable[..., Path]
) -> None:
    other = make_checkpoint(classes=("CE", "LAA", "other"))
    export_checkpoint(other, repository, ["torchscript"], ServingOptions(versions_loaded=2))
    written = config(repository, "tile_network_torchscript")
    assert written.version_policy.latest.num_versions == 1
    assert list(written.output[0].dims) == [3]
    assert (repository / "tile_classifier/labels.txt").read_text() == "CE\nLAA\nother\n"


@pytest.mark.parametrize("change", ["size", "batch"])
def test_a_format_left_behind_is_not_stranded(
    change: str,
    repository: Path,
    make_checkpoint: Callable[..., Path],
    checkpoint_dir: Path,
    snapshot: Snapshot,
) -> None:
    source = make_checkpoint(size_px=96) if change == "size" else checkpoint_dir
    options = ServingOptions(max_batch=8 if change == "size" else 4)
    before = snapshot(repository)
    with pytest.raises(RepositoryError, match=r"tile_network_onnx \(64 px, batches up to 8\)"):
        export_checkpoint(source, repository, ["torchscript"], options)
    assert snapshot(repository) == before


class Faulty(TorchScript):
    """A format that leaves the normalisation out."""

    def build(self, network: Network) -> Artifact:
        return super().build(dataclasses.replace(network, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))


def test_a_fault_in_the_second_format_publishes_neither(
    repository: Path, checkpoint_dir: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(repository)
    onnx = release.formats_named(["onnx"])
    monkeypatch.setattr(release, "formats_named", lambda names: [*onnx, Faulty()])
    with pytest.raises(ParityError, match="Nothing was published"):
        export_checkpoint(checkpoint_dir, repository, ["onnx", "torchscript"])
    assert snapshot(repository) == before


def test_two_exports_at_once_do_not_mix(repository: Path, checkpoint_dir: Path, snapshot: Snapshot) -> None:
    before = snapshot(repository)
    with hold_repository(repository), pytest.raises(RepositoryBusyError):
        export_checkpoint(checkpoint_dir, repository, ["torchscript"])
    assert snapshot(repository) == before


def test_a_broken_configuration_in_the_repository_is_named(
    repository: Path, checkpoint_dir: Path, snapshot: Snapshot
) -> None:
    (repository / "tile_network_onnx/config.pbtxt").write_text("{")
    before = snapshot(repository)
    with pytest.raises(RepositoryError, match=r"tile_network_onnx/config\.pbtxt is not a Triton"):
        export_checkpoint(checkpoint_dir, repository, ["torchscript"])
    assert snapshot(repository) == before


def alter_manifest(checkpoint: Path, **changes: object) -> None:
    path = checkpoint / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_checkpoints_that_cannot_be_exported(checkpoint_dir: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    with pytest.raises(CheckpointError, match="missing"):
        export_checkpoint(tmp_path / "none", repository, ["onnx"])
    wrong = Path(shutil.copytree(checkpoint_dir, tmp_path / "wrong"))
    alter_manifest(wrong, version=99)
    with pytest.raises(CheckpointVersionError, match="99"):
        export_checkpoint(wrong, repository, ["onnx"])
    without_tile = Path(shutil.copytree(checkpoint_dir, tmp_path / "without_tile"))
    (without_tile / "golden_tiles/0000.jpg").unlink()
    with pytest.raises(CheckpointError, match=r"golden_tiles/0000\.jpg"):
        export_checkpoint(without_tile, repository, ["onnx"])
    assert not repository.exists()


def test_options_report_all_their_problems() -> None:
    with pytest.raises(FormatError, match=r"max_batch.*instances.*instance_kind.*versions_loaded"):
        ServingOptions(max_batch=0, instances=1000, instance_kind="tpu", versions_loaded=0)
