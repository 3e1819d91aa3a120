"""torchrun --standalone --nproc_per_node N -m training.benchmarks.gradients --data DIR --recipe FILE

Every window of accumulated batches of all processes, as training takes them, against a bare PyTorch step on the same
items as one batch: the gradients after clipping, and the weights at the end of the epoch. The last line of stdout is
one JSON document, from the main process. Part of the benchmarks `accumulation` and `processes`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import nn

from slides.labels import read_labels
from slides.spec import ModelSpec
from training import optimisation, processes, recipe
from training.folds import split_by_patient
from training.learner import Learner, class_weights
from training.network import TileNetwork
from training.order import EpochOrder, make_loader
from training.task import Split
from training.tile_task import TileTask


class PlainTask(TileTask):
    """Single tiles with a small network whose answer to a tile does not depend on the others of the batch."""

    def build_network(self, *, weights: bool = True) -> nn.Module:
        return TileNetwork(plain_backbone(self.recipe.spec), self.recipe.spec)


def plain_backbone(spec: ModelSpec) -> nn.Module:
    """Convolutions with GroupNorm: no BatchNorm, no dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, len(spec.class_names)),
    )


def load_task(plan: recipe.Recipe, data: Path) -> PlainTask:
    """The tiles of a folder, split as the recipe says."""
    records = read_labels(data, class_names=plan.spec.class_names)
    train, held_out = split_by_patient(
        records, folds=plan.folds, held_out_fold=plan.held_out_fold, seed=plan.seed
    )
    return PlainTask.load(plan, data, Split(tuple(train), (), tuple(held_out)))  # type: ignore[return-value]


def differences(plan: recipe.Recipe, task: TileTask, accelerator: accelerate.Accelerator) -> dict[str, Any]:
    """One epoch by the learner, and the same windows by a bare loop.

    Returns:
        gradient and weights: largest |difference|; items: of each window; clipped: windows whose gradient was clipped.
    """
    order = EpochOrder(
        len(task.train_set),
        plan.batch_size,
        seed=plan.seed,
        accumulation=plan.gradient_accumulation_steps,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    learner = Learner(plan, task, accelerator, steps=order.windows, resumes=False)
    bare = _Bare(plan, task, learner)
    taken: list[list[torch.Tensor]] = []

    def take(*_: Any) -> None:
        taken.append([p.grad.detach().clone() for p in learner.network.parameters() if p.grad is not None])

    learner.optimizer.optimizer.register_step_pre_hook(take)
    loader = make_loader(task.train_set, order, workers=0, device=accelerator.device, seed=0)
    gradient, items, clipped = 0.0, [], 0
    for batch, (inputs, labels_N, _) in enumerate(loader):
        rate = learner.learning_rate()
        if learner.learn(inputs, labels_N, epoch=1, batch=batch, order=order):
            window = order.window_items(batch).tolist()
            expected, norm = bare.step(window, rate)
            pairs = zip(taken[-1], expected, strict=True)
            gradient = max(gradient, *(float((one - other).abs().max()) for one, other in pairs))
            items.append(len(window))
            clipped += norm > plan.max_gradient_norm
    with torch.no_grad():
        pairs = zip(learner.network.parameters(), bare.network.parameters(), strict=True)
        weights = max(float((one - other).abs().max()) for one, other in pairs)
    return {"gradient": gradient, "weights": weights, "items": items, "clipped": clipped}


class _Bare:
    """One batch, one backward pass, one step: what accumulation and processes have to add up to."""

    def __init__(self, plan: recipe.Recipe, task: TileTask, learner: Learner) -> None:
        self.plan, self.task = plan, task
        self.network = copy.deepcopy(learner.network)
        groups = optimisation.parameter_groups(self.network, None, weight_decay=plan.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate)
        self.loss = nn.CrossEntropyLoss(class_weights(task, plan), label_smoothing=plan.label_smoothing)

    def step(self, items: Sequence[int], rate: float) -> tuple[list[torch.Tensor], float]:
        """(gradients after clipping, their norm before)."""
        shown = [self.task.train_set[index] for index in items]
        logits_NK = self.network(torch.stack([tile for tile, _, _ in shown]))
        self.loss(logits_NK, torch.tensor([label for _, label, _ in shown])).backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.plan.max_gradient_norm)
        gradients = [p.grad.detach().clone() for p in self.network.parameters() if p.grad is not None]
        optimisation.set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return gradients, float(norm)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of ready-cut tiles")
    parser.add_argument("--recipe", required=True, help="TOML file")
    options = parser.parse_args(arguments)
    plan = recipe.load(options.recipe)
    accelerator = processes.make_accelerator(plan)
    told = differences(plan, load_task(plan, options.data), accelerator)
    if accelerator.is_main_process:
        print(json.dumps({"processes": accelerator.num_processes, **told}), flush=True)
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
