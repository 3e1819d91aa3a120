"""training/trainer.py, in one process; test_train.py runs two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from training import trainer
from training.errors import DataError, DivergedError
from training.learner import class_weights
from training.optimisation import learning_rate_share
from training.processes import make_accelerator
from training.recipe import Recipe
from training.tile_task import TileTask

MakeTask = Callable[[Recipe], TileTask]
TIMED = {"images_per_s", "step_s", "data_wait_share", "rss_bytes", "peak_rss_bytes"}


def train(plan: Recipe, make_task: MakeTask, **changes: Any) -> trainer.TrainingResult:
    changed = plan.model_copy(update=changes)
    return trainer.train(changed, make_task(changed), make_accelerator(changed))


def untimed(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in entry.items() if name not in TIMED} for entry in history]


def test_learns_and_repeats_itself(plan: Recipe, make_task: MakeTask) -> None:
    first, again = train(plan, make_task), train(plan, make_task)
    other = train(plan, make_task, seed=8, epochs=1)
    state, state_again, state_other = (result.model.state_dict() for result in (first, again, other))
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    assert not torch.equal(state["backbone.fc.weight"], state_other["backbone.fc.weight"])
    assert untimed(first.history) == untimed(again.history)
    assert np.array_equal(first.held_out_probabilities_NK, again.held_out_probabilities_NK)
    assert [entry["epoch"] for entry in first.history] == [1, 2, 3]
    assert first.history[-1]["train_loss"] < first.history[0]["train_loss"]
    assert first.history[-1]["held_out_tile_accuracy"] == 1.0
    assert first.best_epoch == 3


def test_every_epoch_shows_other_tiles(plan: Recipe, make_task: MakeTask) -> None:
    task = make_task(plan)
    shown: list[tuple[int, int]] = []
    item = type(task.train_set).__getitem__

    class Watched(type(task.train_set)):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            shown.append((self.epoch, index))
            return item(self, index)

    task.train_set.__class__ = Watched
    trainer.train(plan, task, make_accelerator(plan))
    a_epoch = len(task.train_set) // plan.batch_size * plan.batch_size
    assert [epoch for epoch, _ in shown] == [1] * a_epoch + [2] * a_epoch + [3] * a_epoch
    orders = [tuple(index for of, index in shown if of == epoch) for epoch in (1, 2, 3)]
    assert len(set(orders)) == 3
    assert all(len(set(order)) == a_epoch for order in orders), "no tile twice in an epoch"


def test_speed_and_memory_are_in_the_history(plan: Recipe, make_task: MakeTask) -> None:
    entry = train(plan, make_task, epochs=1).history[0]
    assert set(entry) >= TIMED
    assert 0 < entry["step_s"] * entry["images_per_s"] == pytest.approx(plan.batch_size, rel=0.01)
    assert 0 <= entry["data_wait_share"] <= 1
    assert 1e8 < entry["rss_bytes"] <= entry["peak_rss_bytes"] < 1e11


def test_held_out_probabilities_are_the_returned_models(plan: Recipe, make_task: MakeTask) -> None:
    for changes in ({}, {"channels_last": True, "ema_decay": 0.9}):
        result = train(plan, make_task, epochs=1, **changes)
        assert not result.model.training
        assert result.held_out_probabilities_NK.dtype == np.float32
        held_out, rows = make_task(plan).held_out_set, []
        for start in range(0, len(held_out), plan.batch_size):
            chosen = range(start, min(start + plan.batch_size, len(held_out)))
            with torch.inference_mode():
                rows.append(result.model(torch.stack([held_out[index][0] for index in chosen])).softmax(1))
        assert np.array_equal(torch.cat(rows).numpy(), result.held_out_probabilities_NK)


def test_accumulation_steps_the_leftover_window(plan: Recipe, make_task: MakeTask) -> None:
    # 22 or 23 tiles in batches of 4 are 5 batches: windows of 3 and 2, so 2 steps an epoch and 4 in two epochs.
    changes = {"epochs": 2, "batch_size": 4, "gradient_accumulation_steps": 3, "warmup_share": 0.0}
    result = train(plan, make_task, **changes)
    assert len(make_task(plan).train_set) // 4 == 5
    shares = [
        learning_rate_share(step, 4, schedule="cosine", warmup_share=0.0) * plan.learning_rate
        for step in (1, 3)
    ]
    assert [entry["learning_rate"] for entry in result.history] == pytest.approx(shares)


def test_a_loss_that_is_no_number_stops_training(plan: Recipe, make_task: MakeTask) -> None:
    with pytest.raises(
        DivergedError, match=r"loss became (nan|inf) in epoch 1, step \d+, .*lower learning_rate"
    ):
        train(plan, make_task, learning_rate=1e30, warmup_share=0.0)


def test_fewer_tiles_than_a_step_takes(plan: Recipe, make_task: MakeTask) -> None:
    with pytest.raises(DataError, match=r"there are 2\d, one step takes 64; lower batch_size"):
        train(plan, make_task, batch_size=64)


def test_early_stopping_keeps_the_best_weights_by_patients_of_its_own(
    plan: Recipe, make_task: MakeTask
) -> None:
    changes = {"epochs": 6, "validation_share": 0.34, "early_stopping_patience": 2, "learning_rate": 3e-3}
    result = train(plan, make_task, **changes)
    losses = [entry["validation_patient_log_loss"] for entry in result.history]
    assert result.best_epoch == 1 + losses.index(min(losses))
    assert len(losses) == min(6, result.best_epoch + 2)
    if result.best_epoch < len(losses):
        last = train(plan, make_task, **{**changes, "epochs": 6, "early_stopping_patience": 0})
        assert not torch.equal(
            last.model.state_dict()["backbone.fc.weight"], result.model.state_dict()["backbone.fc.weight"]
        )
    split = make_task(plan.model_copy(update=changes)).split
    patients = [
        {record.patient_id for record in part} for part in (split.train, split.validation, split.held_out)
    ]
    assert all(patients)
    assert sum(map(len, patients)) == len(set.union(*patients)), "a patient is on two sides"


def test_snapshots_at_the_end_of_every_cycle(plan: Recipe, make_task: MakeTask) -> None:
    changed = plan.model_copy(
        update={"epochs": 4, "schedule": "cyclic", "cycles": 2, "ema_decay": 0.5, "warmup_share": 0.0}
    )
    kept: dict[int, tuple[Any, np.ndarray]] = {}
    result = trainer.train(
        changed,
        make_task(changed),
        make_accelerator(changed),
        on_snapshot=lambda number, network, answers: kept.update({number: (network, answers)}),
    )
    assert list(kept) == [1, 2]
    last = result.model.state_dict()
    assert all(torch.equal(value, last[name]) for name, value in kept[2][0].state_dict().items())
    assert np.array_equal(kept[2][1], result.held_out_probabilities_NK)
    assert not np.array_equal(kept[1][1], kept[2][1])
    rates = [entry["learning_rate"] for entry in result.history]
    assert rates[1] < rates[0] > rates[3]
    assert rates[2] > rates[1], "the rate rises again with the second cycle"


def test_everything_a_recipe_can_ask_for_at_once(plan: Recipe, make_task: MakeTask) -> None:
    asked = {
        "mixup_alpha": 0.4,
        "ema_decay": 0.8,
        "channels_last": True,
        "sync_batch_norm": True,
        "class_weights": "none",
        "label_smoothing": 0.1,
        "stain_augmentation": 0.2,
        "layer_decay": 0.8,
        "backbone_learning_rate_factor": 0.5,
        "gradient_accumulation_steps": 2,
        "mixed_precision": "bf16",
        "workers": 1,
    }
    result = train(plan, make_task, **asked)
    assert all(torch.isfinite(value).all() for value in result.model.state_dict().values())
    assert result.history[-1]["train_loss"] < 1.0


def test_class_weights_even_out_the_classes(plan: Recipe, make_task: MakeTask) -> None:
    task = make_task(plan)
    task.train_set.labels = [0] * 9 + [1] * 3
    assert class_weights(task, plan).tolist() == pytest.approx([12 / 18, 12 / 6])
    assert class_weights(task, plan.model_copy(update={"class_weights": "none"})).tolist() == [1, 1]
    task.train_set.labels = [0] * 12
    assert class_weights(task, plan).tolist() == pytest.approx([0.5, 0.0])
