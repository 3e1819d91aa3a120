"""The reference profile of a model's configuration, as samples; what is no profile says so once and breaks nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.drift_reference import reference_samples, without_repeats

PROFILE: dict[str, Any] = {
    "version": 1,
    "class": {"count": 960, "patients": 60, "shares": {"CE": 0.6, "LAA": 0.4}},
    "confidence": {"count": 960, "patients": 60, "buckets": [["0.65", 0.35], ["+Inf", 0.65]]},
    "appearance": {"count": 900, "patients": 50, "buckets": {"brightness": [["0.6", 0.5], ["+Inf", 0.5]]}},
}


def share(**labels: str) -> dict[str, str]:
    return {"class": "", "statistic": "", "after": "", "le": "", **labels}


def test_every_part_becomes_samples() -> None:
    samples = reference_samples("tile_classifier", {"clotline_reference": json.dumps(PROFILE), "other": "x"})
    of_model = {"model": "tile_classifier"}
    of_tiles = {"model": "tile_preprocess", "quantity": "appearance", "statistic": "brightness"}
    assert [(labels, value) for name, labels, value in samples if name == "clotline_reference_share"] == [
        (share(**of_model, quantity="class", **{"class": "CE"}), 0.6),
        (share(**of_model, quantity="class", **{"class": "LAA"}), 0.4),
        (share(**of_model, quantity="confidence", after="-Inf", le="0.65"), 0.35),
        (share(**of_model, quantity="confidence", after="0.65", le="+Inf"), 0.65),
        (share(**of_tiles, after="-Inf", le="0.6"), 0.5),
        (share(**of_tiles, after="0.6", le="+Inf"), 0.5),
    ]
    assert [sample for sample in samples if sample[0] != "clotline_reference_share"] == [
        ("clotline_reference_count", {**of_model, "quantity": "class"}, 960),
        ("clotline_reference_patients", {**of_model, "quantity": "class"}, 60),
        ("clotline_reference_count", {**of_model, "quantity": "confidence"}, 960),
        ("clotline_reference_patients", {**of_model, "quantity": "confidence"}, 60),
        ("clotline_reference_count", {"model": "tile_preprocess", "quantity": "appearance"}, 900),
        ("clotline_reference_patients", {"model": "tile_preprocess", "quantity": "appearance"}, 50),
    ]


def test_a_model_without_a_profile_has_no_samples(capsys: pytest.CaptureFixture[str]) -> None:
    assert reference_samples("tile_classifier", {"clotline_spec": "{}"}) == []
    assert reference_samples("tile_classifier", {"clotline_reference": '{"version": 1}'}) == []
    assert capsys.readouterr().err == ""


def altered(part: str, **changes: Any) -> str:
    return json.dumps({**PROFILE, part: {**PROFILE[part], **changes}})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        "{}",
        json.dumps({**PROFILE, "version": 2}),
        json.dumps({**PROFILE, "class": None}),
        altered("class", shares={"CE": 0.6, "LAA": 0.6}),
        altered("class", shares={"CE": 1.5, "LAA": -0.5}),
        altered("class", shares={"CE": "much"}),
        altered("class", count=0),
        altered("class", patients=float("nan")),
        altered("confidence", buckets=[]),
        altered("confidence", buckets=[["0.65", 1.0]]),
        altered("confidence", buckets=[["0.9", 0.5], ["0.65", 0.2], ["+Inf", 0.3]]),
        altered("confidence", buckets=[["0.65", 0.5, 1], ["+Inf", 0.5]]),
        altered("appearance", buckets={"brightness": 1}),
        altered("appearance", buckets=[]),
    ],
)
def test_what_is_no_profile_is_told_once(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):  # every scrape asks
        assert reference_samples("slide_classifier", {"clotline_reference": text}) == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(
        "serving: slide_classifier: parameter clotline_reference is no reference profile"
    )
    assert len(lines[0]) < 600


def test_of_two_models_that_tell_how_tiles_look_the_first_is_heard() -> None:
    other = json.loads(json.dumps(PROFILE))
    other["appearance"]["buckets"] = {"brightness": [["0.7", 0.5], ["+Inf", 0.5]]}
    of_models = [
        reference_samples(name, {"clotline_reference": json.dumps(profile)})
        for name, profile in (("slide_classifier", PROFILE), ("tile_classifier", other))
    ]
    kept = without_repeats(of_models)
    edges = [labels["le"] for _, labels, _ in kept if labels.get("statistic")]
    assert edges == ["0.6", "+Inf"]
    assert [labels["model"] for name, labels, _ in kept if name.endswith("count")] == [
        *("slide_classifier", "slide_classifier", "tile_preprocess", "tile_classifier", "tile_classifier")
    ]
    assert len(kept) == sum(map(len, of_models)) - 4


def test_samples_can_be_changed_without_changing_the_next_ones() -> None:
    parameters = {"clotline_reference": json.dumps(PROFILE)}
    reference_samples("tile_classifier", parameters)[0][1]["instance"] = "x"
    assert "instance" not in reference_samples("tile_classifier", parameters)[0][1]
