from __future__ import annotations

import dataclasses

from clients.prediction import Prediction, patient_predictions
from clients.table import patient_table, slide_table


def test_one_line_a_slide_in_columns(prediction: Prediction) -> None:
    other = dataclasses.replace(
        prediction, image_id="a_very_long_name_12", label="LAA", probabilities={"CE": 0.125, "LAA": 0.875}
    )
    assert slide_table([prediction, other]).splitlines() == [
        "slide                patient  label   p(CE)  p(LAA)  tiles",
        "-------------------  -------  -----  ------  ------  -----",
        "abc123_0             abc123   CE     0.5000  0.5000      4",
        "a_very_long_name_12  abc123   LAA    0.1250  0.8750      4",
    ]


def test_known_labels_are_held_against_the_prediction(prediction: Prediction) -> None:
    other = dataclasses.replace(prediction, image_id="z_0", patient_id="z")
    third = dataclasses.replace(prediction, image_id="new_0", patient_id="new")
    lines = slide_table([prediction, other, third], {"abc123_0": "CE", "z_0": "LAA"}).splitlines()
    assert lines[0].endswith("in the labels")
    assert lines[2].endswith("CE (right)")
    assert lines[3].endswith("LAA (WRONG)")
    assert lines[4].endswith("4")
    patients = patient_table(patient_predictions([prediction, other]), {"z": "LAA"}).splitlines()
    assert patients[2].split() == ["abc123", "CE", "0.5000", "0.5000", "1"]
    assert patients[3].endswith("LAA (WRONG)")
