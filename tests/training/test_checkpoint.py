"""training/checkpoint.py"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from slides.decode import decode_tile, encode_tile
from training import checkpoint, network
from training.errors import CheckpointError, CheckpointVersionError, OutputExistsError
from training.recipe import Recipe


@pytest.fixture
def model(plan: Recipe) -> network.TileNetwork:
    torch.manual_seed(1)
    return network.build("squeezenet1_1", plan.spec).eval()


@pytest.fixture
def golden() -> list[checkpoint.GoldenTile]:
    generator = np.random.default_rng(2)
    return [
        checkpoint.GoldenTile(
            image_id=f"p{number}_0",
            label=("CE", "LAA")[number % 2],
            data=encode_tile(generator.integers(0, 256, (48, 48, 3), dtype=np.uint8), 90),
            probabilities=(0.1 + number, 1 / 3),
        )
        for number in range(4)
    ]


Save = Callable[..., Path]


@pytest.fixture
def save(
    model: network.TileNetwork, golden: list[checkpoint.GoldenTile], plan: Recipe, tmp_path: Path
) -> Save:
    def to(name: str = "check point", **changes: Any) -> Path:
        arguments: dict[str, Any] = {
            "architecture": "squeezenet1_1",
            "metrics": {"patient_auc": 0.9},
            "data": {"fingerprint": "f" * 64, "slides": 4},
            "golden_tiles": golden,
            "about": {"git_commit": "unknown"},
        }
        return checkpoint.save(tmp_path / name, model, plan.spec, **{**arguments, **changes})

    return to


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_reload_gives_the_same_probabilities_to_the_bit(
    save: Save, model: network.TileNetwork, golden: list[checkpoint.GoldenTile], plan: Recipe
) -> None:
    loaded = checkpoint.load(save())
    tiles_NHWC = torch.from_numpy(np.stack([decode_tile(tile.data, 32) for tile in golden]))
    with torch.inference_mode():
        assert torch.equal(loaded.model(tiles_NHWC).softmax(1), model(tiles_NHWC).softmax(1))
    assert loaded.spec == plan.spec
    assert loaded.golden_tiles == tuple(golden)
    assert not loaded.model.training


def test_manifest_says_where_it_comes_from(save: Save) -> None:
    directory = save()
    manifest = checkpoint.read_manifest(directory)
    assert (manifest["format"], manifest["version"]) == ("clotline.checkpoint", 1)
    assert manifest["metrics"] == {"patient_auc": 0.9}
    assert manifest["git_commit"] == "unknown"
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    assert manifest["weights_sha256"] == digest
    names = {path.name for path in directory.iterdir()}
    assert names == {"checkpoint.json", "model.safetensors", "golden_tiles"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "has version 2, this Clotline reads version 1"),
        ({"version": None}, "has version None"),
        ({"format": "keras"}, "format 'keras'"),
    ],
)
def test_other_version_or_format(save: Save, changes: dict[str, Any], message: str) -> None:
    directory = save()
    edit(directory, **changes)
    with pytest.raises(CheckpointVersionError, match=message):
        checkpoint.load(directory)


def test_truncated_weights(save: Save) -> None:
    directory = save()
    weights = directory / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"bytes, \d+ were written: it is truncated"):
        checkpoint.load(directory)


def test_altered_weights(save: Save) -> None:
    directory = save()
    weights = bytearray((directory / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (directory / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"SHA-256 .* it was altered"):
        checkpoint.load(directory)


@pytest.mark.parametrize("architecture", ["squeezenet1_0", "resnet18"])
def test_weights_of_another_architecture(save: Save, architecture: str) -> None:
    directory = save()
    edit(directory, architecture=architecture)
    with pytest.raises(
        CheckpointError, match=f"not hold the weights of '{architecture}'.*tensors do not fit"
    ):
        checkpoint.load(directory)


def test_weights_for_another_number_of_classes(save: Save, plan: Recipe) -> None:
    directory = save()
    edit(directory, spec={**plan.spec.as_dict(), "class_names": ["a", "b", "c"]})
    with pytest.raises(CheckpointError, match=r"backbone.classifier.1.bias is \[2\], not \[3\]"):
        checkpoint.load(directory)


def test_unknown_architecture_and_broken_spec(save: Save, plan: Recipe) -> None:
    directory = save()
    edit(directory, architecture="resnet19")
    with pytest.raises(CheckpointError, match="'resnet19' is no"):
        checkpoint.load(directory)
    edit(directory, architecture="squeezenet1_1", spec={**plan.spec.as_dict(), "colour": 1})
    with pytest.raises(CheckpointError, match="unknown key 'colour'"):
        checkpoint.load(directory)


def test_weights_that_are_no_safetensors(save: Save) -> None:
    directory = save()
    junk = b"\x80\x04pickle"
    (directory / "model.safetensors").write_bytes(junk)
    edit(directory, weights_bytes=len(junk), weights_sha256=hashlib.sha256(junk).hexdigest())
    with pytest.raises(CheckpointError, match="check point"):
        checkpoint.load(directory)


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(
    save: Save, model: network.TileNetwork, tmp_path: Path
) -> None:
    directory = save("good")
    state = {**model.state_dict()}
    state["backbone.classifier.1.bias"] = torch.tensor([0.0, float("nan")])
    weights = safetensors.torch.save(state)
    (directory / "model.safetensors").write_bytes(weights)
    edit(directory, weights_bytes=len(weights), weights_sha256=hashlib.sha256(weights).hexdigest())
    with pytest.raises(CheckpointError, match=r"backbone.classifier.1.bias hold values that are not finite"):
        checkpoint.load(directory)
    with torch.no_grad():
        model.backbone.classifier[1].bias.fill_(float("inf"))
    with pytest.raises(CheckpointError, match="not finite"):
        save("bad")
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


@pytest.mark.parametrize("name", ["checkpoint.json", "model.safetensors", "golden_tiles/0001.jpg"])
def test_missing_file(save: Save, name: str) -> None:
    directory = save()
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing; a checkpoint is the directory"):
        checkpoint.load(directory)


def test_what_is_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is missing"):
        checkpoint.load(tmp_path / "absent")
    (tmp_path / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        checkpoint.load(tmp_path)
    (tmp_path / "checkpoint.json").write_text("[]")
    with pytest.raises(CheckpointVersionError, match="format 'list'"):
        checkpoint.load(tmp_path)


def test_incomplete_manifest_names_all_that_is_wrong(save: Save) -> None:
    directory = save()
    edit(directory, spec=3, weights_bytes="many", golden_tiles=None)
    with pytest.raises(
        CheckpointError, match=r"spec must be dict.*weights_bytes must be int.*golden_tiles must be"
    ):
        checkpoint.load(directory)


def test_broken_golden_tile(save: Save) -> None:
    directory = save()
    (directory / "golden_tiles" / "0002.jpg").write_bytes(b"no image")
    with pytest.raises(CheckpointError, match=r"golden tile .*0002.jpg.* is not usable"):
        checkpoint.load(directory)


def test_golden_tiles_stay_inside_the_checkpoint(save: Save, tmp_path: Path) -> None:
    directory = save()
    (tmp_path / "outside.jpg").write_bytes((directory / "golden_tiles" / "0000.jpg").read_bytes())
    entry = {"file": "../outside.jpg", "image_id": "x", "label": "CE", "probabilities": [0.5, 0.5]}
    edit(directory, golden_tiles=[entry])
    with pytest.raises(CheckpointError, match=r"\.\./outside\.jpg"):
        checkpoint.load(directory)


def test_an_existing_checkpoint_is_replaced_only_on_request(save: Save, tmp_path: Path) -> None:
    directory = save()
    with pytest.raises(OutputExistsError, match="--overwrite"):
        save(metrics={"patient_auc": 0.5})
    assert checkpoint.read_manifest(directory)["metrics"] == {"patient_auc": 0.9}
    save(metrics={"patient_auc": 0.5}, overwrite=True)
    assert checkpoint.read_manifest(directory)["metrics"] == {"patient_auc": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["check point"]


def test_a_file_in_the_way_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("not a directory")
    with pytest.raises(CheckpointError, match=r"out is no directory that this user may write to"):
        checkpoint.refuse_existing(tmp_path / "out" / "checkpoint", overwrite=True)
    checkpoint.refuse_existing(tmp_path / "new" / "deep" / "checkpoint", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_the_old_checkpoint(save: Save, tmp_path: Path) -> None:
    directory = save()
    before = (directory / "checkpoint.json").read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (1_000_000, limits[1])
        )  # a write beyond it fails, as ENOSPC does
        with pytest.raises(CheckpointError, match=r"cannot be written: .*nothing was left behind"):
            save(metrics={"patient_auc": 0.5}, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (directory / "checkpoint.json").read_bytes() == before
    checkpoint.load(directory)
    assert [path.name for path in tmp_path.iterdir()] == ["check point"]


def test_nothing_but_the_directory_is_needed(save: Save, tmp_path: Path) -> None:
    moved = save().rename(tmp_path / "elsewhere")
    code = "import sys; from training.checkpoint import load; print(load(sys.argv[1]).spec.class_names)"
    root = str(Path(__file__).resolve().parents[2])
    told = subprocess.run(
        [sys.executable, "-c", code, str(moved)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "('CE', 'LAA')"


def test_a_manifest_without_kind_is_of_tiles(save: Save) -> None:
    directory = save()
    assert "kind" not in json.loads((directory / "checkpoint.json").read_text())
    assert checkpoint.kind_of(directory) == "tile"
    edit(directory, kind="tile")
    assert checkpoint.load(directory).manifest["kind"] == "tile"
    edit(directory, kind="slide")
    with pytest.raises(CheckpointError, match=r"is a slide checkpoint, a tile checkpoint is wanted here"):
        checkpoint.load(directory)
    edit(directory, kind=None)
    with pytest.raises(CheckpointVersionError, match="kind None"):
        checkpoint.read_manifest(directory, kind=None)
