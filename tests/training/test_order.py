"""training/order.py"""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

from training.order import EpochOrder, ShareOrder, make_loader


def joined(processes: int, batch_size: int, epoch: int = 1, items: int = 50) -> list[list[int]]:
    """The batches with the same number of all processes, put together."""
    orders = [
        EpochOrder(items, batch_size, seed=4, process=process, processes=processes)
        for process in range(processes)
    ]
    for order in orders:
        order.start(epoch)
    return [list(chain.from_iterable(batches)) for batches in zip(*orders, strict=True)]


def test_processes_share_what_one_would_take() -> None:
    assert joined(4, 3) == joined(2, 6) == joined(1, 12)
    assert joined(1, 12) == joined(1, 12)
    assert joined(1, 12) != joined(1, 12, epoch=2)
    taken = list(chain.from_iterable(joined(4, 3)))
    assert len(taken) == len(set(taken)) == 48


def test_a_position_is_reached_without_what_lies_before_it() -> None:
    order = EpochOrder(50, 4, seed=4)
    order.start(7)
    whole = list(order)
    order.start(7, first_batch=5)
    assert list(order) == whole[5:]
    assert len(order) == len(whole) - 5


@pytest.mark.parametrize("process", [0, 1])
def test_windows_hold_the_items_of_all_processes(process: int) -> None:
    order = EpochOrder(60, 4, seed=4, accumulation=3, process=process, processes=2)
    assert (order.batches, order.windows) == (7, 3)
    assert [order.window_size(batch) for batch in range(7)] == [3, 3, 3, 3, 3, 3, 1]
    batches = joined(2, 4, items=60)
    for batch in range(7):
        first = batch - batch % 3
        assert order.window_items(batch).tolist() == list(chain(*batches[first : first + 3]))


@pytest.mark.parametrize(("items", "processes"), [(10, 1), (10, 2), (10, 3), (2, 3), (9, 2)])
def test_every_item_is_answered_and_processes_get_equally_many_batches(items: int, processes: int) -> None:
    orders = [ShareOrder(items, 4, process=process, processes=processes) for process in range(processes)]
    assert len({len(order) for order in orders}) == 1
    assert {index for order in orders for batch in order for index in batch} == set(range(items))


def test_a_loader_leaves_the_generator_of_the_process_alone() -> None:
    items = list(zip(torch.arange(8), range(8), range(8), strict=True))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for workers in (0, 1):
        loader = make_loader(
            items,  # type: ignore[arg-type]
            ShareOrder(8, 3),
            workers=workers,
            device=torch.device("cpu"),
            seed=0,
        )
        assert np.concatenate([batch[2].numpy() for batch in loader]).tolist() == list(range(8))
    assert torch.equal(torch.get_rng_state(), before)
