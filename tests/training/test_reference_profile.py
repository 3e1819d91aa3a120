"""Histograms as Prometheus counts them, and the profile that a training leaves in its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydantic
import pytest
import torch

from slides.appearance import CONFIDENCE_EDGES, STATISTICS, appearance
from slides.decode import decode_tile
from training import checkpoint
from training.recipe import Recipe
from training.reference_profile import (
    ReferenceProfile,
    answers_of,
    appearance_of_items,
    histogram,
    profile,
)
from training.tile_task import TileTask


def test_a_bucket_holds_its_upper_edge_and_not_the_one_before() -> None:
    values_N = np.array([0.0, 0.1, 0.1000001, 0.2, 0.5, 9.0])
    assert histogram(values_N, (0.1, 0.2, 0.3)) == [2, 2, 0, 2]
    assert histogram(np.array([]), (0.1,)) == [0, 0]


def test_answers_are_counted_by_predicted_class_and_patients_once() -> None:
    answers_NK = np.array([[0.97, 0.03], [0.45, 0.55], [0.45, 0.55], [0.5, 0.5]], np.float32)
    found = answers_of(answers_NK, ["a", "a", "b", "b"], ("CE", "LAA"))
    assert (found.count, found.patients) == (4, 2)
    assert sum(found.confidence["CE"]) == 2
    assert found.confidence["CE"][CONFIDENCE_EDGES.index(0.99)] == 1
    # FP32 of 0.55 is just above 0.55, and that is what the server sees as well
    assert found.confidence["LAA"][CONFIDENCE_EDGES.index(0.6)] == 2


def test_of_many_tiles_a_spread_is_looked_at() -> None:
    asked: list[int] = []
    tile = checkpoint_tile()

    def encoded(row: int) -> bytes:
        asked.append(row)
        return tile

    found = appearance_of_items([(f"p{row // 10}", row) for row in range(100)], encoded, 32, most=5)
    assert asked == [0, 25, 50, 74, 99]
    assert (found.count, found.patients) == (5, 5)


def checkpoint_tile() -> bytes:
    from slides.decode import encode_tile

    return encode_tile(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8), 90)


def test_a_checkpoint_of_tiles_has_the_profile_of_its_held_out_tiles(
    make_task: Callable[[Recipe], TileTask], plan: Recipe, tmp_path: Path
) -> None:
    task = make_task(plan)
    held_out = task.held_out_set
    generator = np.random.default_rng(0)
    answers_NK = generator.dirichlet((1, 1), len(held_out)).astype(np.float32)
    network = task.build_network().eval()
    task.save(tmp_path / "checkpoint", network, answers_NK, metrics={}, about={}, overwrite=False)
    manifest = checkpoint.load(tmp_path / "checkpoint").manifest
    found = ReferenceProfile.model_validate(manifest["reference_profile"])
    assert found.is_current
    assert found.source == "held_out"
    patients = {record.patient_id for record in task.split.held_out}
    assert found.tiles is not None
    assert (found.tiles.count, found.tiles.patients) == (len(held_out), len(patients))
    predicted = answers_NK.argmax(1)
    assert [sum(found.tiles.confidence[name]) for name in ("CE", "LAA")] == np.bincount(predicted).tolist()
    assert found.slides is not None
    assert found.slides.count == len(task.split.held_out)
    assert found.appearance is not None
    looks = [appearance(decode_tile(held_out.encoded(row), 32)) for row in range(len(held_out))]
    for name, edges in STATISTICS.items():
        assert found.appearance.statistics[name] == histogram(np.array([look[name] for look in looks]), edges)
    assert all(patient not in json.dumps(manifest["reference_profile"]) for patient in patients)


def test_a_checkpoint_of_before_still_loads(
    make_task: Callable[[Recipe], TileTask], plan: Recipe, tmp_path: Path
) -> None:
    task = make_task(plan)
    answers_NK = np.full((len(task.held_out_set), 2), 0.5, np.float32)
    network = task.build_network().eval()
    directory = task.save(tmp_path / "checkpoint", network, answers_NK, metrics={}, about={}, overwrite=False)
    path = directory / checkpoint.MANIFEST_NAME
    manifest = json.loads(path.read_text())
    del manifest["reference_profile"]
    path.write_text(json.dumps(manifest))
    assert torch.equal(
        next(checkpoint.load(directory).model.parameters()), next(iter(network.parameters())).cpu()
    )


def test_other_edges_are_noticed() -> None:
    made = profile("golden").as_dict()
    assert ReferenceProfile.model_validate(made).is_current
    made["appearance_edges"]["brightness"][0] = 0.11
    assert not ReferenceProfile.model_validate(made).is_current


@pytest.mark.parametrize(
    "wrong",
    [
        {"source": "guessed"},
        {"more": 1},
        {"tiles": {"count": 2, "patients": 1, "confidence": {"CE": [1] + [0] * 16}}},
        {"tiles": {"count": 1, "patients": 1, "confidence": {"CE": [1]}}},
        {"appearance": {"count": 1, "patients": 1, "statistics": {"brightness": [0] * 17}}},
        {"appearance": {"count": 1, "patients": 1, "statistics": {"colour": [1]}}},
    ],
)
def test_what_does_not_add_up_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(pydantic.ValidationError):
        ReferenceProfile.model_validate({**profile("held_out").as_dict(), **wrong})
