"""The reference profile of a slide checkpoint: answers of slides, looks of the tiles in their bags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from training.mil import checkpoint as slide_checkpoint
from training.recipe import Recipe
from training.reference_profile import ReferenceProfile


def test_slides_and_the_tiles_of_their_bags_are_counted(
    plan: Callable[..., Recipe], make_task: Callable[[Recipe], Any], tmp_path: Path
) -> None:
    task = make_task(plan())
    held_out = task.held_out_set
    answers_NK = np.random.default_rng(0).dirichlet((1, 1), len(held_out)).astype(np.float32)
    directory = task.save(
        tmp_path / "checkpoint", task.build_network(), answers_NK, metrics={}, about={}, overwrite=False
    )
    found = ReferenceProfile.model_validate(slide_checkpoint.load(directory).manifest["reference_profile"])
    assert found.tiles is None
    assert found.slides is not None
    assert found.slides.count == len(held_out)
    assert sum(found.slides.confidence["CE"]) == int((answers_NK.argmax(1) == 0).sum())
    assert found.appearance is not None
    assert found.appearance.count == sum(len(held_out.rows(index)) for index in range(len(held_out)))
    assert found.appearance.patients == len({record.patient_id for record in task.split.held_out})
