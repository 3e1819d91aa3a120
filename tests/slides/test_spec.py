from __future__ import annotations

import dataclasses
import json

import pytest

from slides.errors import SlidesError, SpecError
from slides.spec import IMAGENET_MEAN, ModelSpec


def test_json_round_trip_is_equal_compact_and_sorted(spec: ModelSpec) -> None:
    text = spec.to_json()
    assert ModelSpec.from_json(text) == spec
    assert ModelSpec.from_dict(spec.as_dict()) == spec
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert ": " not in text
    assert spec.mean == IMAGENET_MEAN
    assert ModelSpec.from_json(text).to_json() == text


def test_fields_with_a_default_may_be_left_out_and_others_not(spec: ModelSpec) -> None:
    values = spec.as_dict()
    del values["jpeg_quality"]
    assert ModelSpec.from_dict(values).jpeg_quality == 90
    del values["um_per_px"]
    values["um_per_pixel"] = 0.5
    with pytest.raises(SpecError, match=r"unknown key 'um_per_pixel'; missing key 'um_per_px'"):
        ModelSpec.from_dict(values)


def test_every_problem_is_named_at_once(spec: ModelSpec) -> None:
    values = spec.as_dict() | {
        "class_names": ["CE", "CE"],
        "tile_size_px": 0,
        "um_per_px": float("nan"),
        "input_size_px": True,
        "std": [0.2, 0, 0.2],
        "min_tissue_share": 1.5,
        "jpeg_quality": 101,
    }
    with pytest.raises(SpecError) as caught:
        ModelSpec.from_dict(values)
    for name in (
        "class_names",
        "tile_size_px",
        "um_per_px",
        "input_size_px",
        "std",
        "min_tissue_share",
        "jpeg",
    ):
        assert name in str(caught.value)
    assert isinstance(caught.value, SlidesError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("names", [["CE"], ["CE", ""], ["CE", " LAA"], ["CE", "L\nA"], "CE", ["CE", 3]])
def test_bad_class_names(spec: ModelSpec, names: object) -> None:
    with pytest.raises(SpecError, match="class_names"):
        ModelSpec.from_dict(spec.as_dict() | {"class_names": names})


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_not_a_json_object(text: str) -> None:
    with pytest.raises(SpecError):
        ModelSpec.from_json(text)


def test_frozen(spec: ModelSpec) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.um_per_px = 1.0  # type: ignore[misc]
