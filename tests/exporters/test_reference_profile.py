"""What a release says of the tiles that it should see: buckets that are large enough, and the parameter that carries them."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from exporters import reference_profile
from exporters.comparison_tiles import comparison_tiles
from exporters.model_card import render
from exporters.reference_plot import reference_plot
from exporters.reference_profile import joined, parameter_of
from exporters.release import export_release
from exporters.release_manifest import Manifest, load
from exporters.triton_config import from_text
from serving.drift_reference import reference_samples
from slides.appearance import CONFIDENCE_EDGES, STATISTICS
from training.checkpoint import Checkpoint
from training.reference_profile import (
    AnswerProfile,
    AppearanceProfile,
    ReferenceProfile,
    profile,
)

COUNTS = [0, 0, 3, 1, 40, 30, 20, 6]
EDGES = (0.1, 0.2, 0.3, 0.4, 0.55, 0.6, 1.0)


def held_out(*, patients: int = 50) -> ReferenceProfile:
    """1,000 made-up tiles of 50 slides."""
    generator = np.random.default_rng(0)

    def counts(total: int, buckets: int) -> list[int]:
        return generator.multinomial(total, np.full(buckets, 1 / buckets)).tolist()

    def answers(total: int) -> AnswerProfile:
        of_class = (total * 6 // 10, total * 4 // 10)
        confidence = {
            name: counts(n, len(CONFIDENCE_EDGES) + 1)
            for name, n in zip(("CE", "LAA"), of_class, strict=True)
        }
        return AnswerProfile(count=total, patients=patients, confidence=confidence)

    statistics = {name: counts(1000, len(edges) + 1) for name, edges in STATISTICS.items()}
    appearance = AppearanceProfile(count=1000, patients=patients, statistics=statistics)
    return profile("held_out", tiles=answers(1000), slides=answers(50), appearance=appearance)


def test_neighbours_are_joined_until_a_tenth_is_in_each_bucket() -> None:
    assert joined(COUNTS, EDGES, 1000) == [("0.55", 0.44), ("0.6", 0.3), ("1.0", 0.2), ("+Inf", 0.06)]
    assert joined([50, 0, 50], (0.1, 0.2), 1000) == [("0.1", 0.5), ("+Inf", 0.5)]
    assert joined([30, 4, 30, 36], (0.1, 0.2, 0.3), 1000) == [("0.1", 0.3), ("0.3", 0.34), ("+Inf", 0.36)]
    assert joined([1] * 30, tuple(np.arange(1, 30) / 30), 1000) == [
        *((str(edge / 30), 0.1) for edge in range(3, 30, 3)),
        ("+Inf", 0.1),
    ]
    assert joined([0, 0, 100], (0.1, 0.2), 1000) == joined([100, 0, 0], (0.1, 0.2), 1000) == [("+Inf", 1)]


def test_few_patients_make_few_buckets() -> None:
    assert joined(COUNTS, EDGES, 20) == [("0.55", 0.44), ("0.6", 0.3), ("+Inf", 0.26)]
    assert joined(COUNTS, EDGES, 12) == [("0.55", 0.44), ("+Inf", 0.56)]
    assert joined(COUNTS, EDGES, 9) == [("+Inf", 1.0)]  # less than two buckets of five patients
    assert joined(COUNTS, EDGES, 4) == [("+Inf", 1.0)]


@pytest.mark.parametrize("patients", [10, 50, 400])
def test_the_parameter_is_what_serving_reads(patients: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = held_out(patients=patients)
    parameters = parameter_of(found, "tiles", with_appearance=True)
    samples = reference_samples("tile_classifier", parameters)
    assert capsys.readouterr().err == ""
    shares = [(labels, value) for name, labels, value in samples if name == "clotline_reference_share"]
    assert {labels["quantity"] for labels, _ in shares} == {"class", "confidence", "appearance"}
    assert {labels["statistic"] for labels, _ in shares} == {"", *STATISTICS}
    classes = {labels["class"]: value for labels, value in shares if labels["quantity"] == "class"}
    assert classes == {"CE": 0.6, "LAA": 0.4}
    edges = [labels["le"] for labels, _ in shares if labels["quantity"] == "confidence"]
    assert set(edges) <= {*map(str, CONFIDENCE_EDGES), "+Inf"}
    assert len(edges) == {10: 2, 50: 10, 400: 10}[patients]
    assert len(parameters["clotline_reference"]) < 3000  # every client reads it


def test_slides_have_their_own_answers_and_a_release_tells_once_how_tiles_look() -> None:
    told = json.loads(parameter_of(held_out(), "slides", with_appearance=False)[reference_profile.PARAMETER])
    assert told["class"]["count"] == 50
    assert "appearance" not in told
    assert parameter_of(None, "tiles", with_appearance=True) == {}
    assert parameter_of(profile("golden"), "tiles", with_appearance=True) == {}
    assert parameter_of(held_out(patients=3), "tiles", with_appearance=True) == {}


def test_a_profile_of_other_edges_or_none_is_left_alone() -> None:
    good: dict[str, Any] = held_out().as_dict()
    assert reference_profile.of_manifest({"reference_profile": good}) == held_out()
    assert reference_profile.of_manifest({}) is None
    assert reference_profile.of_manifest({"reference_profile": {**good, "version": 2}}) is None
    other = {**good, "confidence_edges": [edge / 2 for edge in CONFIDENCE_EDGES]}
    assert reference_profile.of_manifest({"reference_profile": other}) is None


def test_of_golden_tiles_only_the_looks_are_told(loaded: Checkpoint) -> None:
    tiles = comparison_tiles(loaded, None)
    answers_NK = np.full((len(tiles.encoded), 2), 0.5, np.float32)
    golden = reference_profile.of_tiles(tiles, answers_NK, golden=True)
    assert golden is not None
    assert (golden.source, golden.tiles) == ("golden", None)
    given = reference_profile.of_tiles(tiles, answers_NK, golden=False)
    assert given is not None
    assert given.tiles is not None
    assert (given.source, given.tiles.patients) == ("comparison", 6)
    nobody = dataclasses.replace(tiles.truth, patients_N=(None,) * 6, images_N=(None,) * 6)
    assert (
        reference_profile.of_tiles(dataclasses.replace(tiles, truth=nobody), answers_NK, golden=True) is None
    )


@pytest.fixture(scope="module")
def watched_release(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of a checkpoint in which training left a profile."""
    root = tmp_path_factory.mktemp("watched")
    source = root / "checkpoint"
    shutil.copytree(checkpoint_dir, source)
    path = source / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "reference_profile": held_out().as_dict()}))
    export_release(source, root / "release", ["onnx", "torchscript"], served=False)
    return root / "release"


def test_a_release_carries_the_profile_of_its_checkpoint(watched_release: Path) -> None:
    manifest = load(watched_release)
    assert manifest.reference == held_out()

    def told(model: str) -> dict[str, Any]:
        config = from_text((watched_release / f"models/{model}/config.pbtxt").read_text(), origin=model)
        return json.loads(config.parameters[reference_profile.PARAMETER].string_value)

    assert {*told("tile_classifier")} == {"version", "class", "confidence", "appearance"}
    assert {*told("tile_classifier_torchscript")} == {"version", "class", "confidence"}
    assert {*told("slide_classifier")} == {"version", "class", "confidence"}
    assert told("slide_classifier")["class"]["count"] == 50


def test_the_card_shows_it(watched_release: Path, release_dir: Path) -> None:
    card = (watched_release / "MODEL_CARD.md").read_text()
    assert "taken of all held-out tiles at the end of training" in card
    assert "| class of tiles | CE 60.0%, LAA 40.0% | 1000 | 50 |" in card
    assert "plots/reference_profile.png" in card
    assert (watched_release / "plots/reference_profile.png").is_file()
    assert "it is **small**" in (release_dir / "MODEL_CARD.md").read_text()
    nothing = Manifest.model_validate({**load(release_dir).as_dict(), "reference": None})
    assert "drift of this release cannot be watched" in render(nothing)


def test_a_manifest_of_before_still_loads(release_dir: Path) -> None:
    values = load(release_dir).as_dict()
    del values["reference"]
    assert Manifest.model_validate(values).reference is None


def test_the_picture_has_a_panel_for_each_histogram() -> None:
    everything = np.asarray(Image.open(io.BytesIO(reference_plot(held_out(), title="x"))))
    golden = profile("golden", appearance=held_out().appearance)
    looks = np.asarray(Image.open(io.BytesIO(reference_plot(golden, title="x"))))
    assert everything.shape[1] * 4 == looks.shape[1] * 5
    assert everything.std() > 10
    with pytest.raises(ValueError, match="nothing to draw"):
        reference_plot(profile("golden"), title="x")
