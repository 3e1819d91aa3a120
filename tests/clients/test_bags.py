"""What a slide classifier says of itself, which tiles it gets, and answers that cannot be."""

from __future__ import annotations

import numpy as np
import pytest

from clients.answers import BAGS, read_model_card
from clients.bags import OUTPUTS, BagCard, check_bag_answer, read_bag_card
from clients.errors import AnswerError, ModelMismatch
from clients.heatmap import draw_heatmap
from clients.prediction import bag_prediction
from clients.table import slide_table
from slides.spec import ModelSpec
from slides.tissue import TileRef

SPEC = ModelSpec(
    class_names=("CE", "LAA"),
    tile_size_px=64,
    um_per_px=0.5,
    input_size_px=32,
    tiles_per_slide=8,
    min_tissue_share=0.3,
)
LIMITS = {"max_tiles": "100", "max_bag_bytes": "1000000"}
REFS = [TileRef(64 * n, 0, 64, 0.9, darkness) for n, darkness in enumerate((0.1, 0.5, 0.3, 0.5, 0.2))]


def outputs(tiles: int = 3) -> dict[str, np.ndarray | None]:
    one = np.ones(1, np.float32)
    return {
        "probabilities": np.array([0.3, 0.7], np.float32),
        "confidence": np.array([0.7], np.float32),
        "label_index": np.array([1]),
        "attention": np.full(tiles, 1 / tiles, np.float32),
        "entropy": 0.6 * one,
        "mutual_information": 0.1 * one,
        "std": 0.2 * one,
        "answered": np.array([False]),
        "release": np.array([b"0123456789abcdef"], object),
    }


def test_the_card_of_a_slide_classifier() -> None:
    config = {
        "parameters": {
            key: {"string_value": value}
            for key, value in {
                **LIMITS,
                "clotline_spec": SPEC.to_json(),
                "clotline_bag": '{"choice": "darkest", "tiles": 2}',
            }.items()
        },
        "input": [{"name": "tiles"}],
        "output": [{"name": name} for name in OUTPUTS],
        "max_batch_size": 0,
    }
    card = read_model_card("slide_classifier", "1", config)
    assert card.bag == BagCard(100, 1_000_000, 2, "darkest")
    assert card.max_batch == 100
    assert BAGS.shape(5) == [5]


def test_the_bag_is_chosen_as_in_training() -> None:
    from training.mil.bags import SlideBag, evaluation_rows
    from training.mil.options import BagOptions

    bag = SlideBag(None, [b""] * 5, np.array([ref.darkness for ref in REFS]))  # type: ignore[arg-type]
    for tiles in (1, 2, 3, 4, 5, 9):
        for choice, trained in (("darkest", "darkest"), ("even", "random")):
            chosen = BagCard(100, 10**6, tiles, choice).chosen(REFS)
            rows = evaluation_rows(bag, BagOptions(tiles=tiles, choice=trained))
            expected = sorted(rows.tolist()) if tiles >= 5 else rows.tolist()
            assert [REFS.index(ref) for ref in chosen] == expected


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"max_tiles": "many", "max_bag_bytes": "1"},
        {**LIMITS, "clotline_bag": '{"choice": "best"}'},
        {**LIMITS, "clotline_bag": "no json"},
        {**LIMITS, "clotline_bag": '{"colour": 1}'},
    ],
)
def test_parameters_that_do_not_hold(parameters: dict[str, str]) -> None:
    with pytest.raises(ModelMismatch, match="parameters of bags"):
        read_bag_card("slide_classifier", parameters)


def test_an_answer_becomes_a_prediction_a_table_and_a_heatmap() -> None:
    answer = check_bag_answer(outputs(5), tile_count=5, class_count=2, source="s")
    prediction = bag_prediction(
        REFS,
        answer,
        SPEC.class_names,
        image_id="a_0",
        patient_id="a",
        model="slide_classifier",
        model_version="1",
        slide_size_px=(640, 320),
        um_per_px=0.5,
    )
    assert (prediction.label, prediction.answered) == ("LAA", False)
    assert prediction.release == "0123456789abcdef"
    assert prediction.to_dict()["tiles"][0]["attention"] == pytest.approx(0.2)
    assert "(LAA)" in slide_table([prediction])
    assert draw_heatmap(np.full((160, 320, 3), 250, np.uint8), prediction).shape[2] == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention", None),
        ("attention", np.full(2, 0.5, np.float32)),
        ("attention", np.array([0.5, 0.6, 0.7], np.float32)),
        ("probabilities", np.array([np.nan, 1], np.float32)),
        ("probabilities", np.array([-0.5, 1.5], np.float32)),
        ("label_index", np.array([2])),
        ("entropy", np.array([np.inf], np.float32)),
    ],
)
def test_answers_that_cannot_be(name: str, value: np.ndarray | None) -> None:
    with pytest.raises(AnswerError, match="server, model"):
        check_bag_answer({**outputs(), name: value}, tile_count=3, class_count=2, source="server, model")
