"""training/trainer.py, in one process; test_train.py runs two."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from training import trainer
from training.errors import DataError, DivergedError
from training.recipe import Recipe


def train(plan: Recipe, sets: Any, **changes: Any) -> trainer.TrainingResult:
    changed = plan.model_copy(update=changes)
    return trainer.train(changed, sets.train, sets.held_out, trainer.make_accelerator(changed))


def test_learns_and_repeats_itself(plan: Recipe, sets: Any) -> None:
    first, again = train(plan, sets), train(plan, sets)
    assert sets.train.epoch == 3, "Accelerate's loader tells the dataset which epoch to show"
    other = train(plan, sets, seed=8, epochs=1)
    state, state_again, state_other = (result.model.state_dict() for result in (first, again, other))
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    assert not torch.equal(state["backbone.fc.weight"], state_other["backbone.fc.weight"])
    assert first.history == again.history
    assert np.array_equal(first.held_out_probabilities_NK, again.held_out_probabilities_NK)
    assert [entry["epoch"] for entry in first.history] == [1, 2, 3]
    assert first.history[-1]["train_loss"] < first.history[0]["train_loss"]
    assert first.history[-1]["held_out_tile_accuracy"] == 1.0


def test_held_out_probabilities_are_the_returned_models(plan: Recipe, sets: Any) -> None:
    result = train(plan, sets, epochs=1)
    assert not result.model.training
    assert result.held_out_probabilities_NK.dtype == np.float32
    rows = []
    for start in range(0, len(sets.held_out), plan.batch_size):
        chosen = range(start, min(start + plan.batch_size, len(sets.held_out)))
        with torch.inference_mode():
            rows.append(result.model(torch.stack([sets.held_out[index][0] for index in chosen])).softmax(1))
    assert np.array_equal(torch.cat(rows).numpy(), result.held_out_probabilities_NK)


def test_accumulation_steps_the_leftover_window(plan: Recipe, sets: Any) -> None:
    # 22 or 23 tiles in batches of 4 are 5 batches: windows of 3 and 2, so 2 steps an epoch and 4 in two epochs.
    result = train(plan, sets, epochs=2, batch_size=4, gradient_accumulation_steps=3, warmup_share=0.0)
    assert len(sets.train) // 4 == 5
    expected = [
        trainer.learning_rate(step, 4, plan.model_copy(update={"warmup_share": 0.0})) for step in (1, 3)
    ]
    assert [entry["learning_rate"] for entry in result.history] == pytest.approx(expected)


def test_a_loss_that_is_no_number_stops_training(plan: Recipe, sets: Any) -> None:
    with pytest.raises(
        DivergedError, match=r"loss became (nan|inf) in epoch 1, step \d+, .*lower learning_rate"
    ):
        train(plan, sets, learning_rate=1e30, warmup_share=0.0)


def test_fewer_tiles_than_a_step_takes(plan: Recipe, sets: Any) -> None:
    with pytest.raises(DataError, match=r"there are 2\d, one step takes 64; lower batch_size"):
        train(plan, sets, batch_size=64)


def test_learning_rate_rises_then_falls_to_nothing(plan: Recipe) -> None:
    rates = [trainer.learning_rate(step, 100, plan) for step in range(101)]
    top = rates.index(max(rates))
    assert top == round(100 * plan.warmup_share)
    assert rates[top] == plan.learning_rate
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[0] < plan.learning_rate / 10
    assert rates[60] == pytest.approx(plan.learning_rate / 2)
    assert math.isclose(rates[100], 0, abs_tol=1e-12)


def test_class_weights_even_out_the_classes(sets: Any) -> None:
    dataset = sets.train
    dataset.labels = [0] * 9 + [1] * 3
    dataset.tiles = dataset.tiles[:12]
    assert trainer.class_weights(dataset).tolist() == pytest.approx([12 / 18, 12 / 6])
    dataset.labels = [0] * 12
    assert trainer.class_weights(dataset).tolist() == pytest.approx([0.5, 0.0])
