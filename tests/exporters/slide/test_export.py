"""Drafts of slide releases: complete, proven, the same again, and refused where something is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from exporters.errors import FormatError, GoldenTilesError, ParityError
from exporters.formats import formats_named
from exporters.formats.interface import Artifact
from exporters.formats.onnx import Onnx
from exporters.serving_options import ServingOptions
from exporters.slide import export, parity
from exporters.slide.export import SlideDraft, draft_mean, draft_slides
from exporters.slide.source import read_source
from exporters.triton_config import from_text
from training import checkpoint as tile_checkpoint

from .conftest import MakeSlides

OPTIONS = ServingOptions(max_batch=4)


@pytest.fixture(scope="module")
def draft(slide_dir: Path) -> SlideDraft:
    return draft_slides(slide_dir, formats_named(["onnx", "torchscript"]), OPTIONS)


@pytest.fixture(scope="module")
def ensemble_draft(ensemble_path: Path) -> SlideDraft:
    return draft_slides(ensemble_path, formats_named(["onnx"]), OPTIONS)


def test_a_slide_release(draft: SlideDraft) -> None:
    assert draft.public == ("slide_classifier", "slide_classifier_torchscript")
    assert draft.models[-1] == "slide_classifier"
    assert {path.partition("/")[0] for path in draft.files} == set(draft.models)
    for name in ("onnx", "torchscript"):
        exported = draft.formats[name]
        assert exported.model == f"tile_encoder_{name}"
        assert exported.acceptance.status == "accepted"
        assert exported.parity is not None
        assert (exported.parity.tiles, exported.parity.batches) == (3, (1, 2, 4))
        assert exported.parity.max_abs_diff <= 1e-4
        assert exported.notes["embedding"]["max_relative_diff"] <= 1e-4
    assert draft.classifiers["slide_classifier"] == {
        "format": "onnx",
        "parts": {
            "encoders": ["tile_encoder_onnx"],
            "embedder": "tile_embedder_onnx",
            "head": "slide_head_onnx",
        },
    }
    assert draft.heads["combination"] <= 1e-6


def test_configurations_read_back_and_refer_to_each_other(draft: SlideDraft) -> None:
    configs = {
        path.partition("/")[0]: from_text(content.decode(), origin=path)
        for path, content in draft.files.items()
        if path.endswith("config.pbtxt")
    }
    parameters = {key: value.string_value for key, value in configs["slide_classifier"].parameters.items()}
    assert parameters["embedder_model"] == "tile_embedder_onnx"
    assert parameters["embedder_outputs"] == configs["tile_embedder_onnx"].output[0].name
    steps = configs["tile_embedder_onnx"].ensemble_scheduling.step
    assert [(step.model_name, step.model_version) for step in steps] == [
        ("tile_preprocess", 1),
        ("tile_encoder_onnx", 1),
    ]
    assert configs["slide_head_onnx"].max_batch_size == 0
    assert next(iter(configs["slide_head_onnx"].input[0].dims)) == -1
    assert list(configs["tile_encoder_onnx"].output[0].dims) == [512]


def test_golden_bags_hold_what_pytorch_said(draft: SlideDraft, slide_dir: Path) -> None:
    document = json.loads(draft.golden["golden.json"])
    said = json.loads((slide_dir / "checkpoint.json").read_text())["golden_bags"]
    assert document["kind"] == "slide"
    assert [item["image_id"] for item in document["items"]] == ["p0_0", "p1_0", "p2_0"]
    for item, bag in zip(document["items"], said, strict=True):
        assert set(item["paths"]) <= set(draft.golden)
        np.testing.assert_allclose(item["probabilities"], bag["probabilities"], atol=1e-6)
        np.testing.assert_allclose(item["attention"], bag["attention"], atol=1e-6)


def test_the_same_checkpoint_gives_the_same_bytes(draft: SlideDraft, slide_dir: Path) -> None:
    again = draft_slides(slide_dir, formats_named(["onnx"]), OPTIONS, version=1)
    shared = {path for path in again.files if path.endswith((".onnx", "model.py", "labels.txt"))}
    assert {path: again.files[path] for path in shared} == {path: draft.files[path] for path in shared}
    assert again.golden == draft.golden


def test_an_ensemble_runs_its_members_side_by_side(ensemble_draft: SlideDraft) -> None:
    assert ensemble_draft.kind == "ensemble"
    config = from_text(ensemble_draft.files["tile_embedder_onnx/config.pbtxt"].decode(), origin="embedder")
    assert [step.model_name for step in config.ensemble_scheduling.step] == [
        "tile_preprocess",
        "tile_encoder_onnx_0",
        "tile_encoder_onnx_1",
    ]
    assert [output.name for output in config.output] == ["embeddings_0", "embeddings_1"]
    exported = ensemble_draft.formats["onnx"]
    assert {"model.onnx", "tile_encoder_onnx_1/model.onnx"} <= set(exported.files)
    assert [entry["kind"] for entry in ensemble_draft.checkpoint["members"]] == ["slide", "tile"]
    assert ensemble_draft.checkpoint["metrics"] == {"patient_roc_auc": 0.75}
    assert ensemble_draft.heads["combination"] <= 1e-6


def test_a_tile_checkpoint_answers_by_the_mean(tile_dir: Path) -> None:
    checkpoint = tile_checkpoint.load(tile_dir)
    classifiers = {"onnx": "tile_classifier", "torchscript": "tile_classifier_torchscript"}
    draft = draft_mean(checkpoint, classifiers, ServingOptions(max_batch=1), version=3)
    assert draft.public == ("slide_classifier", "slide_classifier_torchscript")
    assert "slide_head_onnx/3/model.onnx" in draft.files
    config = from_text(draft.files["slide_classifier_torchscript/config.pbtxt"].decode(), origin="x")
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert parameters["embedder_model"] == "tile_classifier_torchscript"
    assert (parameters["embedder_version"], parameters["embedder_outputs"]) == ("3", "probabilities")
    assert parameters["tiles_a_request"] == "1"  # no more than the tile classifier takes
    answer = draft.expected.answers[0]
    np.testing.assert_allclose(answer["attention"], [0.5, 0.5])


def test_weights_of_another_epoch_do_not_pass(slide_dir: Path, make_slides: MakeSlides) -> None:
    right, wrong = read_source(slide_dir), read_source(make_slides(seed=9))
    (member,), (other,) = right.members, wrong.members
    mixed = dataclasses.replace(right, members=(dataclasses.replace(member, head=other.head),))
    expected = parity.reference(right, right.golden_bags)
    run = export.open_head(export.head_onnx([other.head], right.definition))
    with pytest.raises(ParityError, match="probabilities differs from PyTorch"):
        parity.check_head(mixed, run, expected)


class _Planted(Onnx):
    """Exports another encoder than it was given."""

    def build(self, network: object) -> Artifact:
        faulty = dataclasses.replace(network, **self.fault)  # type: ignore[type-var]
        return super().build(faulty)


@pytest.mark.parametrize(
    "fault",
    [
        {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
        {"backbone": torch.nn.Sequential(torch.nn.Flatten())},
    ],
    ids=["normalisation is missing", "another network"],
)
def test_a_faulty_encoder_is_refused(slide_dir: Path, fault: dict[str, object]) -> None:
    fmt = _Planted()
    fmt.fault = fault  # type: ignore[attr-defined]
    with pytest.raises(ParityError, match=r"embeddings differ|the embedding is"):
        draft_slides(slide_dir, [fmt], OPTIONS)


def test_a_refused_further_format_is_listed(slide_dir: Path) -> None:
    fmt = _Planted()
    fmt.name, fmt.fault = "onnx-other", {"mean": (0.0, 0.0, 0.0)}  # type: ignore[attr-defined]
    found = draft_slides(slide_dir, [*formats_named(["onnx"]), fmt], OPTIONS, keep_refused=True)
    assert found.public == ("slide_classifier",)
    assert found.formats["onnx-other"].acceptance.status == "refused"
    assert "embeddings differ" in found.formats["onnx-other"].acceptance.reasons[0]


def test_what_is_needed_and_missing_is_said(slide_dir: Path, make_slides: MakeSlides) -> None:
    with pytest.raises(FormatError, match=r"calibrated.*--calibration-tiles"):
        draft_slides(slide_dir, formats_named(["onnx", "onnx-int8"]), OPTIONS)
    with pytest.raises(GoldenTilesError, match=r"tile store.*--tiles"):
        draft_slides(slide_dir, formats_named(["onnx"]), OPTIONS, bags_source=slide_dir)
    with pytest.raises(ParityError, match="unproven"):
        draft_slides(slide_dir, formats_named(["onnx"]), OPTIONS, unservable=lambda fmt: "no such backend")
