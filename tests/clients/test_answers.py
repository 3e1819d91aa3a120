from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clients.answers import check_answers, empty_answers, join_answers, read_model_card
from clients.errors import AnswerError, ModelMismatch
from slides.spec import ModelSpec

SPEC = ModelSpec(
    class_names=("CE", "LAA"),
    tile_size_px=256,
    um_per_px=0.5,
    input_size_px=128,
    tiles_per_slide=16,
    min_tissue_share=0.5,
)


def config(**changes: Any) -> dict[str, Any]:
    return {
        "max_batch_size": 8,
        "input": [{"name": "tile"}],
        "output": [{"name": "probabilities"}, {"name": "confidence"}, {"name": "label_index"}],
        "parameters": {
            "clotline_spec": {"string_value": SPEC.to_json()},
            "clotline_checkpoint": {"string_value": '{"format":"onnx"}'},
        },
    } | changes


def outputs(**changes: Any) -> dict[str, Any]:
    return {
        "probabilities": np.array([[0.25, 0.75], [0.5, 0.5]], np.float32),
        "confidence": np.array([[0.75], [0.5]], np.float32),
        "label_index": np.array([[1], [0]], np.int64),
    } | changes


def checked(**changes: Any) -> Any:
    return check_answers(outputs(**changes), tile_count=2, class_count=2, source="the server")


def test_a_card_holds_what_the_configuration_says() -> None:
    card = read_model_card("tile_classifier", "4", config())
    assert card.spec == SPEC
    assert (card.name, card.version, card.max_batch, card.checkpoint) == (
        "tile_classifier",
        "4",
        8,
        {"format": "onnx"},
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameters": {}}, "no parameter clotline_spec"),
        ({"parameters": {"clotline_spec": {"string_value": "{}"}}}, "does not hold.*missing key"),
        ({"input": [{"name": "tiles"}]}, "one of its parts"),
        ({"output": [{"name": "probabilities"}]}, "one of its parts"),
        ({"max_batch_size": 0}, "max_batch_size 0"),
        (
            {
                "parameters": config()["parameters"] | {"clotline_checkpoint": {"string_value": "{"}},
            },
            "no JSON",
        ),
    ],
)
def test_another_model_is_no_tile_classifier(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelMismatch, match=words):
        read_model_card("m", "1", config(**changes))


def test_answers_are_taken_apart() -> None:
    answers = checked()
    np.testing.assert_array_equal(answers.probabilities_NK, [[0.25, 0.75], [0.5, 0.5]])
    np.testing.assert_array_equal(answers.confidence_N, np.float32([0.75, 0.5]))
    np.testing.assert_array_equal(answers.label_index_N, [1, 0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"probabilities": None}, "without the output 'probabilities'"),
        ({"probabilities": np.zeros((1, 2), np.float32)}, r"shape \[1, 2\], expected \[2, 2\]"),
        ({"label_index": np.zeros((2,), np.int64)}, r"label_index has shape \[2\]"),
        ({"probabilities": np.array([[1, 0], [np.nan, 1]], np.float32)}, "tile 1 are not finite"),
        ({"confidence": np.array([[np.inf], [0.5]], np.float32)}, "confidence of tile 0 are not finite"),
        ({"probabilities": np.zeros((2, 2), np.float32)}, "tile 0 are no distribution"),
        ({"probabilities": np.array([[1, 0], [1.5, -0.5]], np.float32)}, "tile 1 are no distribution"),
        ({"label_index": np.array([[0], [2]], np.int64)}, "tile 1 is 2, expected 0..1"),
    ],
)
def test_answers_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(AnswerError, match=f"the server: .*{words}"):
        checked(**changes)


def test_parts_join_in_order_after_nothing() -> None:
    joined = join_answers([empty_answers(2), checked(), checked(label_index=np.array([[0], [0]], np.int64))])
    assert joined.probabilities_NK.shape == (4, 2)
    np.testing.assert_array_equal(joined.label_index_N, [1, 0, 0, 0])
