"""training/mil/checkpoint.py"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training import checkpoint, network
from training.errors import CheckpointError, CheckpointVersionError, OutputExistsError
from training.mil import checkpoint as slide_checkpoint
from training.mil.checkpoint import GoldenBag, SlideCheckpoint
from training.mil.network import build_encoder, build_head
from training.mil.options import BagOptions

from .conftest import SPEC, make_bags

OPTIONS = BagOptions(tiles=4, attention_dim=8, embedding_dim=8)


@pytest.fixture
def learnt() -> SlideCheckpoint:
    torch.manual_seed(1)
    encoder = build_encoder("squeezenet1_1", SPEC, OPTIONS).module.eval()
    head = build_head(encoder.feature_dim, SPEC, OPTIONS).eval()
    return SlideCheckpoint(encoder, head, SPEC, OPTIONS, {}, ())


@pytest.fixture
def golden(learnt: SlideCheckpoint) -> list[GoldenBag]:
    bags = []
    for bag in make_bags(2)[::2]:
        answer = learnt.answer(bag.tiles)
        assert bag.places is not None
        bags.append(
            GoldenBag(
                image_id=bag.record.image_id,
                label=bag.record.label,
                tiles=tuple(bag.tiles),
                probabilities=tuple(answer.probabilities_K.tolist()),
                attention=tuple(answer.attention_T.tolist()),
                x_px=tuple(bag.places.x_px_T.tolist()),
                y_px=tuple(bag.places.y_px_T.tolist()),
            )
        )
    return bags


Save = Callable[..., Path]


@pytest.fixture
def save(learnt: SlideCheckpoint, golden: list[GoldenBag], tmp_path: Path) -> Save:
    def to(name: str = "check point", **changes: Any) -> Path:
        arguments: dict[str, Any] = {
            "architecture": "squeezenet1_1",
            "bags": OPTIONS,
            "metrics": {"patient_auc": 0.9},
            "data": {"fingerprint": "f" * 64},
            "golden_bags": golden,
            "about": {"git_commit": "unknown"},
        }
        return slide_checkpoint.save(
            tmp_path / name, learnt.encoder, learnt.head, SPEC, **{**arguments, **changes}
        )

    return to


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_there_and_back_to_the_bit(save: Save, learnt: SlideCheckpoint, golden: list[GoldenBag]) -> None:
    directory = save()
    loaded = slide_checkpoint.load(directory)
    assert loaded.golden_bags == tuple(golden)
    assert (loaded.spec, loaded.bags) == (SPEC, OPTIONS)
    assert not loaded.encoder.training
    assert not loaded.head.training
    for bag in loaded.golden_bags:
        answer = loaded.answer(bag.tiles)
        assert answer.probabilities_K.tolist() == list(bag.probabilities)
        assert answer.attention_T.tolist() == list(bag.attention)
        assert answer.attention_T.sum() == pytest.approx(1, abs=1e-6)
    names = {path.name for path in directory.iterdir()}
    assert names == {"checkpoint.json", "encoder.safetensors", "head.safetensors", "golden_bags"}
    manifest = checkpoint.read_manifest(directory, kind="slide")
    assert (manifest["kind"], manifest["version"], manifest["embedding_dim"]) == ("slide", 1, 512)
    assert manifest["git_commit"] == "unknown"


def test_encoder_and_head_can_be_used_apart(save: Save) -> None:
    loaded = slide_checkpoint.load(save())
    (bag, *_) = loaded.golden_bags
    embeddings_TD = np.concatenate([loaded.embed([tile]) for tile in bag.tiles])
    answer = loaded.pool(embeddings_TD)
    assert np.allclose(answer.probabilities_K, bag.probabilities, atol=1e-6)


def test_a_bag_without_tiles(learnt: SlideCheckpoint) -> None:
    with pytest.raises(ValueError, match="one tile at least"):
        learnt.answer([])


def test_a_bag_longer_than_a_batch_of_the_encoder(learnt: SlideCheckpoint) -> None:
    (bag, *_) = make_bags(1, least_tiles=3, most_tiles=3)
    many = learnt.answer(list(bag.tiles) * 50)
    few = learnt.answer(list(bag.tiles))
    assert many.attention_T.shape == (150,)
    assert np.allclose(many.probabilities_K, few.probabilities_K, atol=1e-5)


@pytest.mark.parametrize("name", ["encoder.safetensors", "head.safetensors"])
def test_truncated_and_altered_weights(save: Save, name: str) -> None:
    directory = save()
    weights = (directory / name).read_bytes()
    (directory / name).write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{name} has SHA-256 .* it was altered"):
        slide_checkpoint.load(directory)
    os.truncate(directory / name, len(weights) // 2)
    with pytest.raises(CheckpointError, match=rf"{name} has \d+ bytes, \d+ were written: it is truncated"):
        slide_checkpoint.load(directory)
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        slide_checkpoint.load(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet18"}, "encoder.safetensors does not hold the weights of 'resnet18'"),
        ({"architecture": "resnet19"}, "'resnet19' is no"),
        ({"bags": {"tiles": 4, "attention_dim": 9, "embedding_dim": 8}}, "head.safetensors does not hold"),
        ({"bags": {"tiles": 0, "hat": 1}}, "bags: tiles: .*; hat: Extra inputs"),
        ({"bags": {"encoder_layer": "nowhere"}}, "'nowhere' is no module"),
        ({"embedding_dim": 7}, "embeddings of 512 values, the manifest says 7"),
        ({"head_bytes": "many", "golden_bags": None}, r"head_bytes must be int.*golden_bags must be list"),
        ({"golden_bags": [{"files": ["../x.jpg"]}]}, r"file '\.\./x\.jpg' is not of the form"),
        ({"golden_bags": [{"files": []}]}, "golden bag .* is not usable"),
    ],
)
def test_a_manifest_that_does_not_fit(save: Save, changes: dict[str, Any], message: str) -> None:
    directory = save()
    if "architecture" in changes and changes["architecture"] == "resnet18":
        changes = {**changes, "embedding_dim": 512}
    edit(directory, **changes)
    with pytest.raises(CheckpointError, match=message):
        slide_checkpoint.load(directory)


def test_broken_golden_bag(save: Save) -> None:
    directory = save()
    (directory / "golden_bags" / "0001" / "0000.jpg").write_bytes(b"no image")
    with pytest.raises(CheckpointError, match=r"golden bag .* is not usable"):
        slide_checkpoint.load(directory)
    (directory / "golden_bags" / "0001" / "0000.jpg").unlink()
    with pytest.raises(CheckpointError, match=r"0001/0000\.jpg is missing"):
        slide_checkpoint.load(directory)


def test_weights_that_are_not_finite_are_not_saved(
    save: Save, learnt: SlideCheckpoint, tmp_path: Path
) -> None:
    with torch.no_grad():
        learnt.head.classifier.bias.fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"head.safetensors: classifier.bias hold values that are not"):
        save()
    assert list(tmp_path.iterdir()) == []


def test_kinds_are_told_apart(save: Save, tmp_path: Path) -> None:
    slide = save("slide")
    tile = checkpoint.save(
        tmp_path / "tile",
        network.build("squeezenet1_1", SPEC),
        SPEC,
        architecture="squeezenet1_1",
        metrics={},
        data={},
        golden_tiles=[],
    )
    assert (checkpoint.kind_of(slide), checkpoint.kind_of(tile)) == ("slide", "tile")
    with pytest.raises(CheckpointError, match=r"is a slide checkpoint, .* read by training\.mil\.checkpoint"):
        checkpoint.load(slide)
    with pytest.raises(CheckpointError, match=r"is a tile checkpoint, .* read by training\.checkpoint\.load"):
        slide_checkpoint.load(tile)
    edit(slide, kind="volume")
    with pytest.raises(CheckpointVersionError, match="kind 'volume'"):
        slide_checkpoint.load(slide)


def test_an_existing_checkpoint_is_replaced_only_on_request(save: Save, tmp_path: Path) -> None:
    directory = save()
    with pytest.raises(OutputExistsError, match="--overwrite"):
        save()
    save(metrics={"patient_auc": 0.5}, overwrite=True)
    assert slide_checkpoint.load(directory).manifest["metrics"] == {"patient_auc": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["check point"]


def test_pickle_is_never_read(save: Save) -> None:
    directory = save()
    junk = b"\x80\x04pickle"
    (directory / "head.safetensors").write_bytes(junk)
    edit(directory, head_bytes=len(junk), head_sha256=hashlib.sha256(junk).hexdigest())
    with pytest.raises(CheckpointError, match=r"head\.safetensors"):
        slide_checkpoint.load(directory)
