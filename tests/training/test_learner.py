"""training/learner.py: what accumulation and several processes add up to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training.benchmarks import gradients, material
from training.benchmarks.accumulation import differences
from training.processes import make_accelerator
from training.recipe import Recipe

LARGEST_DIFFERENCE = 1e-6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """117 tiles of 39 patients, 13 of them CE; 78 tiles are trained on."""
    return material.make_tiles(
        tmp_path_factory.mktemp("tiles") / "data", patients=39, tiles_a_patient=3, side_px=40
    )


def plan_of(**changes: Any) -> Recipe:
    usual = {
        "architecture": "resnet18",
        "epochs": 1,
        "learning_rate": 1e-4,
        "label_smoothing": 0.1,
        "warmup_share": 0.0,
    }
    return material.make_recipe(side_px=40, **{**usual, **changes})


@pytest.mark.parametrize("class_weights", ["balanced", "none"])
def test_four_batches_of_eight_are_one_of_32(data: Path, class_weights: str) -> None:
    plan = plan_of(
        batch_size=8, gradient_accumulation_steps=4, max_gradient_norm=0.25, class_weights=class_weights
    )
    told = gradients.differences(plan, gradients.load_task(plan, data), make_accelerator(plan))
    assert told["items"] == [32, 32, 8], "the last window is averaged over what it holds"
    assert told["clipped"] == 3, "the gradients of whole windows are clipped, not those of batches"
    assert told["gradient"] <= LARGEST_DIFFERENCE
    assert told["weights"] <= LARGEST_DIFFERENCE


def test_two_processes_add_up_to_one(data: Path, tmp_path: Path) -> None:
    plan = plan_of(batch_size=4, gradient_accumulation_steps=3, max_gradient_norm=0.25)
    told = differences(plan, data, 2, tmp_path / "joined.toml")
    assert told["processes"] == 2
    assert told["items"] == [24, 24, 24]
    assert told["clipped"] == 3
    assert told["gradient"] <= LARGEST_DIFFERENCE
    assert told["weights"] <= LARGEST_DIFFERENCE
