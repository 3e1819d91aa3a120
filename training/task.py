"""What the training loop trains: tiles and bags of tiles are two tasks of one loop.

`training.trainer` knows batches, steps, processes and how to continue after a kill; a task knows what an item is,
which network answers it, how good the answers are, and what a Checkpoint of it looks like. `training.tile_task.TileTask`
and `training.mil.task.BagTask` are the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from slides.labels import SlideRecord

if TYPE_CHECKING:
    from training.recipe import Recipe

Inputs: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...]"
"""What a network is called with: a tensor, or a tuple of tensors; the first dimension is the item of the batch."""


class Items(Protocol):
    """Items to learn from or to answer: a dataset in torch's sense.

    An item is a pure function of (seed, epoch, index): no generator of the process or of a worker decides anything.
    So neither the number of workers nor a kill changes what an epoch shows.

    Attributes:
        labels: index of the true class of every item.
        slide_of_item: image_id of every item.

    Where the class has a method `collate`, the loader calls it with a list of items to make a batch.
    """

    @property
    def labels(self) -> Sequence[int]: ...

    @property
    def slide_of_item(self) -> Sequence[str]: ...

    def set_epoch(self, epoch: int) -> None:
        """The epoch (from 1) that items are shown for from now on; called before the workers are started."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Inputs, int, int]:
        """(inputs of the network without the dimension of the batch, label, index)."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Slides by what they are for; no patient is in two of the three.

    Attributes:
        train: gradients come from these.
        validation: taken from the patients that could have been trained on; early stopping watches them. May be empty.
        held_out: the fold that scores are made of; nothing is chosen by it.
    """

    train: tuple[SlideRecord, ...]
    validation: tuple[SlideRecord, ...]
    held_out: tuple[SlideRecord, ...]

    @property
    def records(self) -> tuple[SlideRecord, ...]:
        """All of them."""
        return self.train + self.validation + self.held_out

    def as_data(self) -> dict[str, Any]:
        """What a manifest says about it: patients and slides by what they were for."""

        def patients(records: Sequence[SlideRecord]) -> list[str]:
            return sorted({record.patient_id for record in records})

        return {
            "slides": len(self.records),
            "patients": len({record.patient_id for record in self.records}),
            "train_patients": patients(self.train),
            "validation_patients": patients(self.validation),
            "held_out_patients": patients(self.held_out),
            "held_out_slides": [record.image_id for record in self.held_out],
        }


class Task(Protocol):
    """One thing to train.

    Attributes:
        item_name: "tile" or "slide": what an item is called in progress bars, logs and scores.
        class_names: in the order of the network's answers.
        train_set: gradients come from it.
        validation_set: early stopping watches it; None where nothing does.
        held_out_set: items of the held-out slides.
        pretrained: where the weights that training starts from came from (`training.pretrained.load`); set by
            `build_network`, and by the loop where it goes on from a state.
        data: for the manifest: `Split.as_data()`, and fingerprint (SHA-256 of everything learnt from), source, tiles.
    """

    pretrained: dict[str, Any] | None

    @property
    def item_name(self) -> str: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def train_set(self) -> Items: ...

    @property
    def validation_set(self) -> Items | None: ...

    @property
    def held_out_set(self) -> Items: ...

    @property
    def data(self) -> Mapping[str, Any]: ...

    def build_network(self, *, weights: bool = True) -> nn.Module:
        """The network, on the CPU: inputs of a batch to logits FP32 [N, K].

        Weights are drawn from torch's generator, or loaded as the recipe says; with `weights` False they do not
        matter, since others are loaded into the network at once.

        Raises:
            ArchitectureError: there is no such network, or its pretrained weights cannot be had.
        """

    def backbone_of(self, network: nn.Module) -> tuple[nn.Module | None, str]:
        """The part of `build_network`'s network that a recipe freezes or slows down, and the name of its classifier.

        The name is "" where the backbone has no classifier; None, "" where all of the network is new.
        """

    def scores(self, items: Items, probabilities_NK: NDArray[np.float32]) -> dict[str, float]:
        """Scores of answers to `items` (validation_set or held_out_set); patient_log_loss is among them."""

    def held_out_table(self, probabilities_NK: NDArray[np.float32]) -> str:
        """held_out.csv: image_id, patient_id, center_id, label and p_<class>; one row a held-out slide."""

    def save(
        self,
        directory: Path,
        network: nn.Module,
        probabilities_NK: NDArray[np.float32],
        *,
        metrics: Mapping[str, float],
        about: Mapping[str, Any],
        overwrite: bool,
    ) -> Path:
        """Write a Checkpoint of a trained network.

        Args:
            network: as `build_network` makes it, on the CPU, in evaluation mode.
            probabilities_NK: FP32 [N, K], what it answers to held_out_set.
            metrics: `scores` of them, finite ones only.
            about: further entries of the manifest.

        Raises:
            CheckpointError, OutputExistsError: see `training.checkpoint.save`.
        """


def load_task(recipe: Recipe, data: Path, split: Split) -> Task:
    """The task that a recipe describes: bags where it has a table [bags], single tiles where not.

    Called by every process, with the same arguments; see `training.processes` for what only one of them should do.

    Args:
        data: folder with train.csv and train/, or a tile store where recipe.source is "store".

    Raises:
        DataError, StoreError: naming every slide that cannot be used.
    """
    if getattr(recipe, "bags", None) is not None:
        from training.mil.task import BagTask

        return BagTask.load(recipe, data, split)
    from training.tile_task import TileTask

    return TileTask.load(recipe, data, split)
