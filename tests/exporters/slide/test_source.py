"""What a slide release is made of, and what cannot be joined."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from exporters.slide.source import BagChoice, kind_of, read_source
from training.ensembles.combination import Combination
from training.ensembles.definition import Ensemble, Member
from training.errors import CheckpointError, EnsembleError

from .conftest import SPEC, MakeSlides

Checkpoints = list[str | None]


def written(path: Path, checkpoints: Checkpoints, class_names: tuple[str, ...] = SPEC.class_names) -> Path:
    """ensemble.json of soft voting."""
    members = tuple(Member(f"member{m}", "0" * 64, where) for m, where in enumerate(checkpoints))
    weights_M = np.full(len(members), 1 / len(members))
    Ensemble(class_names, members, Combination("soft", weights_M)).save(path / "ensemble.json")
    return path / "ensemble.json"


def test_kinds(slide_dir: Path, tile_dir: Path, tmp_path: Path) -> None:
    definition = written(tmp_path, [str(slide_dir)])
    assert [kind_of(path) for path in (slide_dir, tile_dir, definition, tmp_path)] == [
        "slide",
        "tile",
        "ensemble",
        "ensemble",
    ]
    with pytest.raises(CheckpointError):
        kind_of(tmp_path / "nowhere")


def test_a_slide_checkpoint(slide_dir: Path) -> None:
    source = read_source(slide_dir)
    assert (source.kind, len(source.members), source.bag) == ("slide", 1, BagChoice())
    assert [len(bag.tiles) for bag in source.golden_bags] == [3, 1, 5]
    assert source.origin["encoder_sha256"]
    assert "held_out_patients" not in source.origin["data"]


def test_golden_tiles_of_one_slide_are_a_bag(tile_dir: Path) -> None:
    assert [len(bag.tiles) for bag in read_source(tile_dir).golden_bags] == [2, 2, 2]


def test_members_of_both_kinds_come_into_one_order(slide_dir: Path, tile_dir: Path, tmp_path: Path) -> None:
    source = read_source(written(tmp_path, [str(slide_dir), str(tile_dir)]))
    assert source.spec.class_names == SPEC.class_names
    assert [member.head.order_K for member in source.members] == [(0, 1, 2), (1, 2, 0)]
    assert [member.kind for member in source.members] == ["slide", "tile"]
    assert len(source.golden_bags) == 6


def test_checkpoints_are_found_beside_the_definition(slide_dir: Path) -> None:
    definition = written(slide_dir.parent, [slide_dir.name])
    assert read_source(definition).kind == "ensemble"
    definition.unlink()


def test_bags_by_which_a_network_was_judged(make_slides: MakeSlides) -> None:
    assert read_source(make_slides(tiles=4, choice="darkest")).bag == BagChoice(4, "darkest")
    assert read_source(make_slides(tiles=4, evaluation_tiles=6)).bag == BagChoice(6, "even")


def test_all_that_keeps_members_apart_is_listed(
    slide_dir: Path, make_slides: MakeSlides, tmp_path: Path
) -> None:
    other = make_slides(
        spec=dataclasses.replace(SPEC, um_per_px=0.25, class_names=("CE", "LAA", "rest")), tiles=4
    )
    with pytest.raises(EnsembleError) as caught:
        read_source(written(tmp_path, [str(slide_dir), str(other)]))
    told = "\n".join(caught.value.problems)
    assert "member 'member1': its classes are CE, LAA, rest" in told
    assert "members differ in um_per_px (member0: 0.5, member1: 0.25)" in told
    assert "members were judged by different bags (member0: all tiles, member1: 4 even tiles)" in told


def test_members_need_checkpoints_that_can_be_read(slide_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EnsembleError, match=r"member 'member1' names no checkpoint.*--checkpoints"):
        read_source(written(tmp_path, [str(slide_dir), None]))
    with pytest.raises(EnsembleError, match=r"member 'member0': .*gone"):
        read_source(written(tmp_path, [str(tmp_path / "gone")]))


def test_an_altered_definition_is_refused(slide_dir: Path, tmp_path: Path) -> None:
    definition = written(tmp_path, [str(slide_dir)])
    values = json.loads(definition.read_text())
    definition.write_text(json.dumps({**values, "temperature": 2.0}))
    with pytest.raises(EnsembleError, match="altered"):
        read_source(definition)
