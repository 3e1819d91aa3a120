"""Who is asked about whom, and who had been learnt from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slides.labels import SlideRecord
from slides.spec import ModelSpec
from training.errors import CheckpointError, EvaluationError
from training.evaluation.assignment import assign
from training.evaluation.candidates import (
    HELD_OUT,
    NEW,
    TRAINED,
    UNKNOWN,
    WATCHED,
    Candidate,
    Model,
    models_of,
    read_candidates,
)

SPEC = ModelSpec(
    class_names=("CE", "LAA"), tile_size_px=64, um_per_px=1.0, input_size_px=32, tiles_per_slide=1, min_tissue_share=0.0
)  # fmt: skip


def record(patient: str, number: int = 0) -> SlideRecord:
    return SlideRecord(f"{patient}_{number}", "1", patient, number, "CE", Path("absent.tif"))


RECORDS = [record(patient, number) for patient in "abcdef" for number in (0, 1)]


def candidate(name: str, held_out: str, *, recipe: dict[str, Any] | None = None, **data: Any) -> Candidate:
    facts = {
        "held_out_patients": list(held_out),
        "held_out_slides": [one.image_id for one in RECORDS if one.patient_id in held_out],
        **data,
    }
    manifest = {"architecture": "resnet18", "recipe": recipe or {}, "data": facts, "metrics": {}}
    return Candidate(name, Path("runs") / name, "tile", SPEC, manifest)


def test_exposure_by_what_the_manifest_says() -> None:
    told = candidate("one", "a", train_patients=["b", "c"], validation_patients=["d"]).exposure(RECORDS)
    assert told == {"a": HELD_OUT, "b": TRAINED, "c": TRAINED, "d": WATCHED, "e": NEW, "f": NEW}


def test_a_patient_both_held_out_and_trained_on_counts_as_trained_on() -> None:
    assert candidate("one", "a", train_patients=["a"]).exposure(RECORDS)["a"] == TRAINED


def test_exposure_where_the_manifest_does_not_say() -> None:
    assert candidate("old", "a").exposure(RECORDS) == {"a": HELD_OUT, **dict.fromkeys("bcdef", TRAINED)}
    elsewhere = [record("x"), record("y")]
    assert candidate("old", "a").exposure(elsewhere) == {"x": UNKNOWN, "y": UNKNOWN}


def test_folds_of_one_recipe_are_one_model_in_any_order() -> None:
    def fold(recipe: str, number: int, held_out: str) -> Candidate:
        return candidate(f"{recipe}/fold_{number}", held_out, recipe={"lr": recipe, "held_out_fold": number})

    mixed = [
        fold("x", 0, "ab"),
        fold("y", 1, "cd"),
        fold("x", 1, "cd"),
        fold("y", 0, "ab"),
        fold("x", 2, "ef"),
    ]
    models = models_of(mixed)
    assert [[one.name for one in model.candidates] for model in models] == [
        ["x/fold_0", "x/fold_1", "x/fold_2"],
        ["y/fold_1", "y/fold_0"],
    ]
    assert [model.name for model in models] == ["x/fold, 3 folds", "y/fold, 2 folds"]


def test_the_same_held_out_set_is_compared_not_pooled() -> None:
    models = models_of([candidate("one", "ab"), candidate("two", "ab")])
    assert [model.name for model in models] == ["one", "two"]


def test_held_out_split_asks_each_fold_for_its_own() -> None:
    model = Model("both", (candidate("one", "ab"), candidate("two", "cd")))
    assignment = assign([model], RECORDS, "held-out")
    assert [one.patient_id for one in assignment.records] == list("aabbccdd")
    asked = assignment.answering["both"]
    assert [asked[f"{patient}_0"][0].name for patient in "abcd"] == ["one", "one", "two", "two"]
    assert assignment.exposed_patients() == {}


def test_all_slides_name_who_was_trained_on() -> None:
    assignment = assign([Model("m", (candidate("one", "ab", train_patients=list("cd")),))], RECORDS, "all")
    assert len(assignment.records) == 12
    assert assignment.exposed_patients() == {"c": TRAINED, "d": TRAINED}
    assert assignment.exposure["m"]["e"] == NEW


def test_new_patients_are_answered_by_every_fold_that_never_saw_them() -> None:
    folds = (candidate("one", "a", train_patients=["b", "e"]), candidate("two", "b", train_patients=["a"]))
    assignment = assign([Model("m", folds)], RECORDS, "all")
    names = {image_id: [one.name for one in asked] for image_id, asked in assignment.answering["m"].items()}
    assert names["a_0"] == ["one"]
    assert names["c_0"] == ["one", "two"]
    assert names["e_0"] == ["two"]
    assert assignment.exposed_patients() == {}


def test_data_from_elsewhere_has_nothing_held_out() -> None:
    with pytest.raises(EvaluationError, match="use --split all"):
        assign([Model("m", (candidate("one", "ab"),))], [record("x")], "held-out")


def test_models_without_a_common_slide_cannot_be_compared() -> None:
    models = [Model("one", (candidate("one", "ab"),)), Model("two", (candidate("two", "cd"),))]
    with pytest.raises(EvaluationError, match="no slide in common"):
        assign(models, RECORDS, "held-out")


def test_models_are_compared_on_what_both_answer_and_say_so() -> None:
    models = [Model("one", (candidate("one", "abc"),)), Model("two", (candidate("two", "bcd"),))]
    assignment = assign(models, RECORDS, "held-out")
    assert {one.patient_id for one in assignment.records} == {"b", "c"}
    assert (
        set(assignment.answering["one"]) == set(assignment.answering["two"]) == {"b_0", "b_1", "c_0", "c_1"}
    )
    assert "compared on the 4 that all" in " ".join(assignment.notes)


def test_held_out_slides_that_are_absent_are_told() -> None:
    model = Model("m", (candidate("one", "ab"),))
    assignment = assign([model], [one for one in RECORDS if one.image_id != "b_1"], "held-out")
    assert "1 of 4 slides that it held out are not in the data (b_1)" in assignment.notes[0]


def test_names_are_as_short_as_they_can_be(
    save_tile_checkpoint: Any, slides_dir: Path, tmp_path: Path
) -> None:
    one = save_tile_checkpoint("x/run", slides_dir, [])
    two = save_tile_checkpoint("y/run", slides_dir, [])
    assert [told.name for told in read_candidates([one])] == ["run"]
    assert [told.name for told in read_candidates([one, two])] == ["x/run", "y/run"]
    with pytest.raises(EvaluationError, match="is given twice"):
        read_candidates([one, two, one])
    with pytest.raises(CheckpointError, match="is missing"):
        read_candidates([tmp_path])
