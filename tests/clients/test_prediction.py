from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from clients.prediction import Prediction, patient_predictions, slide_prediction
from slides.errors import AggregationError
from slides.tissue import TileRef

REFS = [TileRef(0, 0, 512, 0.9), TileRef(512, 0, 512, 0.8)]


def predicted(probabilities_NK: np.ndarray, refs: list[TileRef] = REFS) -> Prediction:
    return slide_prediction(
        refs,
        probabilities_NK,
        ("CE", "LAA"),
        image_id="p1_0",
        patient_id="p1",
        model="tile_classifier",
        model_version="2",
        slide_size_px=(5120, 4096),
        um_per_px=0.5,
    )


def test_a_slide_is_the_mean_of_its_tiles() -> None:
    prediction = predicted(np.array([[0.5, 0.5], [0.25, 0.75]], np.float32))
    assert prediction.label == "LAA"
    assert prediction.confidence == 0.625
    assert prediction.probabilities == {"CE": 0.375, "LAA": 0.625}
    assert prediction.tiles[1].x_px == 512
    assert prediction.tiles[1].probabilities == {"CE": 0.25, "LAA": 0.75}


def test_a_prediction_is_frozen_and_json() -> None:
    prediction = predicted(np.array([[0.5, 0.5], [0.25, 0.75]], np.float32))
    document = json.loads(json.dumps(prediction.to_dict(), allow_nan=False))
    assert document["slide_size_px"] == [5120, 4096]
    assert document["tiles"][0] == {
        "x_px": 0,
        "y_px": 0,
        "side_px": 512,
        "tissue_share": 0.9,
        "probabilities": {"CE": 0.5, "LAA": 0.5},
        "attention": None,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        prediction.label = "CE"  # type: ignore[misc]


def test_no_tile_is_no_prediction() -> None:
    with pytest.raises(AggregationError):
        predicted(np.empty((0, 2), np.float32), [])


def test_a_patient_is_the_mean_of_slides_of_equal_weight(prediction: Prediction) -> None:
    slides = [
        dataclasses.replace(
            prediction, image_id="a_0", patient_id="a", probabilities={"CE": 0.9, "LAA": 0.1}
        ),
        dataclasses.replace(
            prediction, image_id="b_0", patient_id="b", probabilities={"CE": 0.2, "LAA": 0.8}
        ),
        dataclasses.replace(
            prediction, image_id="a_1", patient_id="a", probabilities={"CE": 0.5, "LAA": 0.5}, tiles=()
        ),
    ]
    first, second = patient_predictions(slides)
    assert (first.patient_id, first.label, first.image_ids) == ("a", "CE", ("a_0", "a_1"))
    assert first.confidence == pytest.approx(0.7)
    assert (second.patient_id, second.label) == ("b", "LAA")
    assert patient_predictions([]) == []


def test_slides_that_cannot_be_averaged_are_refused(prediction: Prediction) -> None:
    with pytest.raises(ValueError, match="twice"):
        patient_predictions([prediction, prediction])
    other = dataclasses.replace(prediction, image_id="x", probabilities={"LAA": 0.5, "CE": 0.5})
    with pytest.raises(ValueError, match="different classes"):
        patient_predictions([prediction, other])
