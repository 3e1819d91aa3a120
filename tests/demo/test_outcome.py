from __future__ import annotations

import dataclasses
import json
import re

import pytest

from demo.outcome import Outcome
from demo.parity import Parity
from demo.triton_metrics import ModelCounts


def test_the_summary_holds_what_is_promised(outcome: Outcome) -> None:
    summary = json.loads(json.dumps(outcome.summary(), allow_nan=False))
    assert summary["ok"] is True
    assert summary["problems"] == []
    assert (summary["slides"], summary["patients"], summary["held_out_patients"]) == (30, 20, 4)
    assert summary["patient_auc"] == 1.0
    assert summary["patient_accuracy"] == 0.75
    assert summary["parity"]["onnx"]["max_abs_diff"] == 2.4e-7
    assert summary["parity"]["torchscript"]["max_abs_diff"] == 0.0
    assert summary["served_requests"] == 36  # of the ensembles; their parts are not counted again
    assert summary["mean_request_ms"] == pytest.approx(16.667)
    assert summary["wall_s"] == 163.2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"parity": {"onnx": Parity("m", "u", 96, 1.1e-4, 0)}},
            r"onnx \(m\) does not match PyTorch.*1.10e-04",
        ),
        ({"parity": {"onnx": Parity("m", "u", 96, 0.0, 1)}}, "1 other labels"),
        ({"parity": {"onnx": Parity("m", "u", 0, 0.0, 0)}}, "0 tiles"),
        ({"image_max_abs_diff": 0.01}, "client's answers differ"),
        ({"counts": [ModelCounts("tile_classifier", "1", 5, 2)]}, "2 failed requests"),
        ({"least_patient_auc": 1.01}, "is 1.000, expected at least 1.01"),
        ({"held_out_patients": []}, "is not defined, expected at least 0.9"),
    ],
)
def test_what_is_not_good_enough_is_named(outcome: Outcome, change: dict, words: str) -> None:
    worse = dataclasses.replace(outcome, **change)
    assert len(worse.problems) == 1
    assert re.search(words, worse.problems[0])
    assert worse.summary()["ok"] is False


def test_without_a_bar_the_auc_may_be_anything(outcome: Outcome) -> None:
    assert dataclasses.replace(outcome, held_out_patients=[], least_patient_auc=None).problems == []


def test_scores_that_are_not_defined_are_null(outcome: Outcome) -> None:
    manifest = {**outcome.manifest, "metrics": {"patient_auc": float("nan")}}
    summary = dataclasses.replace(outcome, manifest=manifest).summary()
    assert summary["training_metrics"] == {"patient_auc": None}
