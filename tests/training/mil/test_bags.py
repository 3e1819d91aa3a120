"""training/mil/bags.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from slides.decode import decode_tile
from slides.labels import SlideRecord
from training.errors import DataError
from training.mil.bags import (
    Augmentation,
    BagItems,
    EmbeddedBags,
    SlideBag,
    TileBags,
    evaluation_rows,
    of_slides,
    of_store,
    of_tiles,
    training_rows,
)
from training.mil.options import BagOptions
from training.tiles import SlideTiles

from .conftest import SPEC, make_bags

RECORD = SlideRecord("a_0", "1", "a", 0, "CE", Path("none"))


def bag_of(*darkness: float, name: str = "a_0") -> SlideBag:
    record = SlideRecord(name, "1", name, 0, "CE", Path("none"))
    return SlideBag(record, (b"",) * len(darkness), np.array(darkness))


def test_the_darkest_tiles_are_the_same_in_learning_and_judging() -> None:
    bag, options = bag_of(0.1, 0.4, 0.2, 0.4, 0.3), BagOptions(tiles=3, choice="darkest")
    assert evaluation_rows(bag, options).tolist() == [1, 3, 4]
    for epoch in range(3):
        assert training_rows(bag, options, seed=1, epoch=epoch).tolist() == [1, 3, 4]


def test_darkness_is_measured_where_tiles_come_without_it() -> None:
    from slides.decode import encode_tile

    grey = [encode_tile(np.full((32, 32, 3), value, np.uint8), 95) for value in (250, 25, 255)]
    (bag,) = of_tiles([SlideTiles(RECORD, grey)])
    assert bag.darkness_T == pytest.approx([0.0086, 1.0086, 0.0], abs=0.002)


def test_random_tiles_depend_on_seed_epoch_and_slide_alone() -> None:
    options = BagOptions(tiles=5, choice="random")
    bag, other = bag_of(*[0.0] * 40), bag_of(*[0.0] * 40, name="b_0")
    rows = training_rows(bag, options, seed=1, epoch=1)
    assert len(set(rows.tolist())) == 5
    assert (training_rows(bag, options, seed=1, epoch=1) == rows).all()
    different = [
        training_rows(bag, options, seed=1, epoch=2),
        training_rows(bag, options, seed=2, epoch=1),
        training_rows(other, options, seed=1, epoch=1),
    ]
    assert all(found.tolist() != rows.tolist() for found in different)
    seen = {int(row) for epoch in range(60) for row in training_rows(bag, options, seed=1, epoch=epoch)}
    assert seen == set(range(40))


def test_the_bag_of_an_evaluation_is_fixed_and_spread_over_the_slide() -> None:
    options = BagOptions(tiles=4, choice="random")
    assert evaluation_rows(bag_of(*[0.0] * 40), options).tolist() == [5, 15, 25, 35]
    more = BagOptions(tiles=4, evaluation_tiles=8, choice="random")
    assert evaluation_rows(bag_of(*[0.0] * 40), more).tolist() == [2, 7, 12, 17, 22, 27, 32, 37]


@pytest.mark.parametrize("choice", ["darkest", "random"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_slide_with_fewer_tiles_gives_what_it_has(choice: str, count: int) -> None:
    options = BagOptions.model_validate({"tiles": 16, "choice": choice})
    bag = bag_of(*[0.1] * count)
    assert sorted(evaluation_rows(bag, options)) == list(range(count))
    assert sorted(training_rows(bag, options, seed=0, epoch=0)) == list(range(count))


def items_of(bags: list[SlideBag], *, learns: bool, tiles: int = 4) -> TileBags:
    options = BagOptions(tiles=tiles, choice="random")
    return TileBags(bags, SPEC, options, augmentation=Augmentation(0.1) if learns else None, seed=9)


def test_an_item_is_a_function_of_seed_epoch_and_slide() -> None:
    bags = make_bags(4)
    one, other = items_of(bags, learns=True), items_of(bags[::-1], learns=True)
    one.set_epoch(3)
    other.set_epoch(3)
    torch.manual_seed(0)
    values, label, index = one[2]
    torch.manual_seed(1)
    again, _, _ = other[len(bags) - 3]
    assert (index, label) == (2, 1)
    assert torch.equal(values, again)
    other.set_epoch(4)
    assert not torch.equal(values, other[len(bags) - 3][0][: len(values)])


def test_held_out_items_are_the_decoded_tiles_of_the_evaluation_bag() -> None:
    bags = make_bags(4)
    items = items_of(bags, learns=False)
    items.set_epoch(7)
    values, _, _ = items[1]
    expected = [decode_tile(bags[1].tiles[row], 32) for row in evaluation_rows(bags[1], items.options)]
    assert np.array_equal(values.numpy(), np.stack(expected))


def test_a_batch_is_padded_to_its_longest_bag() -> None:
    items = items_of(make_bags(6, least_tiles=1, most_tiles=4), learns=False)
    drawn = [items[index] for index in range(6)]
    (values_BTSS3, mask_BT), labels_B, indices_B = BagItems.collate(drawn)
    lengths = [len(values) for values, _, _ in drawn]
    assert mask_BT.sum(dim=1).tolist() == lengths
    assert values_BTSS3.shape == (6, max(lengths), 32, 32, 3)
    assert values_BTSS3.dtype == torch.uint8
    assert all(torch.equal(values_BTSS3[row, : len(drawn[row][0])], drawn[row][0]) for row in range(6))
    assert labels_B.tolist() == [0, 0, 1, 1, 0, 0]
    assert indices_B.tolist() == list(range(6))


def test_embedded_bags_show_a_view_a_tile_while_learning_and_the_plain_one_otherwise() -> None:
    bags = make_bags(2, least_tiles=4, most_tiles=4)
    views = [np.arange(3, dtype=np.float32)[:, None, None] + np.zeros((3, 4, 5), np.float32) for _ in bags]
    options = BagOptions(tiles=4, encoder="frozen", views=2)
    plain = EmbeddedBags(bags, views, SPEC, options)
    assert (plain[0][0] == 0).all()
    learning = EmbeddedBags(bags, views, SPEC, options, learns=True)
    seen = set()
    for epoch in range(20):
        learning.set_epoch(epoch)
        seen |= set(learning[0][0][:, 0].tolist())
    assert seen == {0.0, 1.0, 2.0}


def test_tiles_cut_now_and_tiles_of_a_store_make_the_same_bags(slide_dir: Path, tmp_path: Path) -> None:
    import dataclasses

    from slides.labels import read_labels
    from training.store.reader import TileStore
    from training.store.spec import StoreSpec
    from training.store.writer import write_store

    spec = dataclasses.replace(SPEC, tile_size_px=64, tiles_per_slide=20, min_tissue_share=0.3)
    records = read_labels(slide_dir, class_names=spec.class_names)
    cut = of_slides(records, spec, show_progress=False)
    cut_as = StoreSpec.of_model(spec)
    write_store(
        slide_dir,
        tmp_path / "store",
        cut_as,
        class_names=spec.class_names,
        workers_count=1,
        show_progress=False,
    )
    stored = of_store(TileStore.open(tmp_path / "store"), records, spec)
    for one, other in zip(cut, stored, strict=True):
        assert len(one.tiles) > 8
        assert list(one.tiles) == list(other.tiles)
        assert one.darkness_T == pytest.approx(other.darkness_T)
        assert one.places is not None
        assert other.places is not None
        assert one.places.x_px_T.tolist() == other.places.x_px_T.tolist()
        assert one.places.y_px_T.tolist() == other.places.y_px_T.tolist()
        darkest = evaluation_rows(one, BagOptions(tiles=3))
        assert (one.places.x_px_T[darkest] < 224).all()
        assert (one.places.y_px_T[darkest] < 224).all()


def test_slides_that_cannot_be_used_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    records = [SlideRecord(name, "1", name, 0, "CE", tmp_path / "broken.tif") for name in ("x_0", "y_0")]
    with pytest.raises(DataError, match=r"2 of 2 slides cannot be used.*\n.*x_0.*\n.*y_0"):
        of_slides(records, SPEC, show_progress=False)
