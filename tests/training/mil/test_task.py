"""training/mil/task.py"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slides.aggregate import mean_probabilities
from slides.decode import decode_tile
from training import trainer
from training.mil import attention
from training.mil import checkpoint as slide_checkpoint
from training.mil.bags import SlideBag, evaluation_rows
from training.mil.network import BagNetwork, SlideNetwork
from training.mil.task import BagTask
from training.processes import make_accelerator
from training.resume import StateKeeper

from .conftest import SPEC, MakeTask, Plan, red_row


def trained(task: BagTask) -> trainer.TrainingResult:
    return trainer.train(task.recipe, task, make_accelerator(task.recipe))


def test_trained_end_to_end_it_finds_the_red_tile(plan: Plan, make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task(plan({"tiles": 6, "encoder_layer": "layer1"}, architecture="resnet18", epochs=8))
    result = trained(task)
    scores = task.scores(task.held_out_set, result.held_out_probabilities_NK)
    assert set(scores) == {
        f"{level}_{name}" for level in ("slide", "patient") for name in ("accuracy", "auc", "log_loss")
    }
    assert scores["patient_auc"] == 1.0
    directory = task.save(
        tmp_path / "checkpoint",
        result.model,
        result.held_out_probabilities_NK,
        metrics=scores,
        about={"git_commit": "unknown"},
        overwrite=False,
    )
    loaded = slide_checkpoint.load(directory)
    assert [bag.label for bag in loaded.golden_bags].count("LAA") == 2
    found = list(attention.of_slides(loaded, task.held_out_set.bags))
    hits = []
    for index, (bag, seen) in enumerate(zip(task.held_out_set.bags, found, strict=True)):
        probabilities_K = result.held_out_probabilities_NK[index]
        assert np.allclose(seen.probabilities_K, probabilities_K, atol=1e-5)
        assert seen.places is not None
        assert seen.places.x_px_T.tolist() == (64 * seen.rows_T).tolist()
        if bag.record.label == "LAA":
            hits.append(seen.rows_T[seen.attention_T.argmax()] == red_row(bag))
    assert np.mean(hits) > 0.7


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_on_a_frozen_encoder(
    plan: Plan, make_task: MakeTask, weights_file: Path, tmp_path: Path, pooling: str
) -> None:
    recipe = plan(
        {"encoder": "frozen", "pooling": pooling, "views": 1},
        weights=str(weights_file),
        epochs=20,
        learning_rate=3e-3,
    )
    task = make_task(recipe)
    result = trained(task)
    assert isinstance(result.model, BagNetwork)
    assert task.backbone_of(result.model) == (None, "")
    assert task.scores(task.held_out_set, result.held_out_probabilities_NK)["patient_auc"] == 1.0
    directory = task.save(
        tmp_path / "checkpoint",
        result.model,
        result.held_out_probabilities_NK,
        metrics={},
        about={},
        overwrite=False,
    )
    loaded = slide_checkpoint.load(directory)
    assert loaded.manifest["pretrained"]["weights"] == str(weights_file)
    for index, bag in enumerate(task.held_out_set.bags):
        rows = evaluation_rows(bag, loaded.bags)
        answer = loaded.answer([bag.tiles[int(row)] for row in rows])
        assert np.allclose(answer.probabilities_K, result.held_out_probabilities_NK[index], atol=1e-5)
    expected = result.held_out_probabilities_NK[
        task.held_out_set.slide_of_item.index(loaded.golden_bags[0].image_id)
    ]
    assert np.allclose(loaded.golden_bags[0].probabilities, expected, atol=1e-5)


def test_the_network_of_a_task_is_reproducible_and_can_be_frozen(plan: Plan, make_task: MakeTask) -> None:
    task = make_task(plan())
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(task.build_network())
    one, other = (model.state_dict() for model in networks)
    assert isinstance(networks[0], SlideNetwork)
    assert all(torch.equal(one[name], other[name]) for name in one)
    backbone, classifier = task.backbone_of(networks[0])
    assert backbone is networks[0].encoder.backbone
    assert classifier == ""
    cut = make_task(plan({"encoder_layer": "features.3"}))
    backbone, _ = cut.backbone_of(cut.build_network())
    assert backbone is not None
    assert {name for name, _ in backbone.named_children()} == {"features"}


def test_tables_have_a_row_a_slide_and_a_row_a_tile(plan: Plan, make_task: MakeTask) -> None:
    task = make_task(plan())
    torch.manual_seed(0)
    model = task.build_network().eval()
    count = len(task.held_out_set)
    probabilities_NK = np.random.default_rng(1).dirichlet([1, 1], count).astype(np.float32)
    rows = list(csv.DictReader(io.StringIO(task.held_out_table(probabilities_NK))))
    assert [row["image_id"] for row in rows] == task.held_out_set.slide_of_item
    assert [float(row["p_LAA"]) for row in rows] == pytest.approx(probabilities_NK[:, 1].tolist())
    text = task.extra_files(model, probabilities_NK)["attention.csv"]
    tiles = list(csv.DictReader(io.StringIO(text)))
    assert {row["image_id"] for row in tiles} == set(task.held_out_set.slide_of_item)
    for image_id in task.held_out_set.slide_of_item:
        own = [row for row in tiles if row["image_id"] == image_id]
        assert sum(float(row["attention"]) for row in own) == pytest.approx(1)
        assert all(int(row["x_px"]) == 64 * int(row["tile"]) for row in own)


def test_a_patients_score_is_the_mean_over_slides(plan: Plan, make_task: MakeTask) -> None:
    task = make_task(plan())
    records = task.split.held_out
    index_of = {"CE": 0, "LAA": 1}
    probabilities_NK = np.random.default_rng(2).dirichlet([1, 1], len(records)).astype(np.float32)
    right = []
    for patient in {record.patient_id for record in records}:
        rows = [row for row, record in enumerate(records) if record.patient_id == patient]
        assert len(rows) == 2
        truth = index_of[records[rows[0]].label]
        right.append(mean_probabilities(probabilities_NK[rows]).argmax() == truth)
    scores = task.scores(task.held_out_set, probabilities_NK)
    assert scores["patient_accuracy"] == pytest.approx(np.mean(right))


def test_what_a_bag_shows_is_what_is_served(slides: list[SlideBag], plan: Plan, make_task: MakeTask) -> None:
    task = make_task(plan())
    values, label, index = task.held_out_set[0]
    bag = task.held_out_set.bags[index]
    rows = evaluation_rows(bag, task.options)
    assert label == SPEC.class_names.index(bag.record.label)
    assert np.array_equal(values.numpy(), np.stack([decode_tile(bag.tiles[int(row)], 32) for row in rows]))
    assert bag in slides


class Killed(Exception):
    """Stands for a kill in the middle of an epoch."""


@pytest.mark.parametrize("encoder", ["trained", "frozen"])
def test_an_interrupted_run_ends_with_the_same_bits(
    plan: Plan, make_task: MakeTask, weights_file: Path, tmp_path: Path, encoder: str
) -> None:
    recipe = plan(
        {
            "encoder": encoder,
            "choice": "random",
            "tiles": 2,
            "dropout": 0.3,
            "views": int(encoder == "frozen"),
        },
        weights=str(weights_file),
        epochs=2,
        gradient_accumulation_steps=2,
        ema_decay=0.8,
    )

    def go(items: float, state: str) -> trainer.TrainingResult:
        task = make_task(recipe)
        get, left = type(task.train_set).__getitem__, [items]

        class Dying(type(task.train_set)):  # type: ignore[misc]
            def __getitem__(self, index: int) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return get(self, index)

        task.train_set.__class__ = Dying
        keeper = StateKeeper(tmp_path / state, {}, process=0, processes=1, save_every_s=0.0)
        with keeper.training():
            return trainer.train(recipe, task, make_accelerator(recipe), keeper=keeper)

    whole = go(np.inf, "whole")
    with pytest.raises(Killed):
        go(22, "state")
    torch.manual_seed(77)
    resumed = go(np.inf, "state")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert np.array_equal(resumed.held_out_probabilities_NK, whole.held_out_probabilities_NK)
