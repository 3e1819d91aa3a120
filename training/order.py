"""The order of items: a pure function of (seed, epoch, number of processes), so that a position is two numbers.

A shuffled epoch is dealt out batch by batch: batch b of process r is the (b * processes + r)-th run of `batch_size`
items. The batches with the same b of all processes together are therefore what one process with a batch of
`processes * batch_size` would take.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from training.task import Items


class EpochOrder(Sampler[list[int]]):
    """Batches of one process in a shuffled epoch; items that do not fill a batch of every process sit it out.

    Args:
        items: how many there are.
        accumulation: batches whose gradients are added up; the last window of an epoch may hold fewer.
    """

    def __init__(
        self,
        items: int,
        batch_size: int,
        *,
        seed: int,
        accumulation: int = 1,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.items = items
        self.batch_size = batch_size
        self.seed = seed
        self.accumulation = accumulation
        self.process = process
        self.processes = processes
        self.batches = items // (batch_size * processes)
        self.windows = -(-self.batches // accumulation)
        self.start(epoch=1)

    def start(self, epoch: int, first_batch: int = 0) -> None:
        """Shuffle for `epoch` (from 1); iteration begins at `first_batch` without touching what lies before it."""
        self.first_batch = first_batch
        self._order_N = np.random.default_rng((self.seed, epoch)).permutation(self.items)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.first_batch, self.batches):
            start = (batch * self.processes + self.process) * self.batch_size
            yield self._order_N[start : start + self.batch_size].tolist()

    def __len__(self) -> int:
        return self.batches - self.first_batch

    def window_size(self, batch: int) -> int:
        """Batches in the accumulation window that `batch` belongs to."""
        first = batch - batch % self.accumulation
        return min(self.accumulation, self.batches - first)

    def window_items(self, batch: int) -> NDArray[np.int64]:
        """Items of all processes in the accumulation window that `batch` belongs to."""
        first = batch - batch % self.accumulation
        a_batch = self.batch_size * self.processes
        return self._order_N[first * a_batch : (first + self.window_size(batch)) * a_batch]


class ShareOrder(Sampler[list[int]]):
    """Batches of one process when every item is answered once, in order; all processes get equally many.

    Where batches run out, the first one is repeated: processes that share a network have to call it equally often.
    """

    def __init__(self, items: int, batch_size: int, *, process: int = 0, processes: int = 1) -> None:
        starts = list(range(0, items, batch_size))
        starts += starts[:1] * (-len(starts) % processes)
        self._batches = [
            list(range(start, min(start + batch_size, items))) for start in starts[process::processes]
        ]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def make_loader(
    items: Items, order: Iterable[list[int]], *, workers: int, device: torch.device, seed: int
) -> DataLoader[tuple[object, torch.Tensor, torch.Tensor]]:
    """A loader of the batches of `order`.

    It has a generator of its own: a loader draws a number whenever it is iterated over, and drawn from the process's
    generator this would make the weights depend on how often a run was resumed.
    """
    return DataLoader(
        items,  # type: ignore[arg-type]
        batch_sampler=order,  # type: ignore[arg-type]
        collate_fn=getattr(items, "collate", None),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(seed),
    )
