"""python -m training.benchmarks step

Images/s of the trainer against a bare PyTorch loop: the same network, batches, loss, clipping and optimiser, tiles in
memory, on the same cores; epochs of the two take turns, and medians are compared. The trainer does all that it does in
use but answering held-out tiles: it shows progress, looks after the loss, logs, and has a state to save.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from slides.labels import SlideRecord
from training import optimisation, processes, recipe, resume
from training.benchmarks import material
from training.loop import Training
from training.network import build
from training.task import Split
from training.tile_task import TileTask
from training.tiles import SlideTiles

LEAST_RATIO = 0.97
LEAST_RATIO_ON_A_GPU = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--architecture", default="resnet18", help="default: %(default)s")
    parser.add_argument(
        "--side-px", type=int, default=64, metavar="PX", help="of the tiles (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--batches", type=int, default=24, metavar="N", help="an epoch (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=7, metavar="N", help="epochs of each (default: %(default)s)"
    )
    parser.add_argument("--mixed-precision", default=None, help="no, bf16 or fp16 (default: bf16 on a GPU)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Bar: 0.97 of the bare loop on a CPU, 0.9 on a GPU (bf16, channels_last)."""
    gpu = torch.cuda.is_available()
    plan = material.make_recipe(
        side_px=options.side_px,
        architecture=options.architecture,
        epochs=2 * options.repeats + 2,
        batch_size=options.batch_size,
        mixed_precision=options.mixed_precision or ("bf16" if gpu else "no"),
        channels_last=gpu,
    )
    with tempfile.TemporaryDirectory() as scratch:
        task = InMemory(plan, options.batches * options.batch_size)
        trainer = _trainer(plan, task, Path(scratch) / "state")
        bare = Bare(plan, task, trainer.accelerator.device)
        seconds: dict[str, list[float]] = {"trainer": [], "bare": []}
        for turn in tqdm(range(options.repeats + 1), desc="epochs", file=sys.stderr):
            for name, epoch in (("trainer", trainer.learn_epoch), ("bare", bare.epoch)):
                started_s = time.perf_counter()
                epoch()
                if gpu:
                    torch.cuda.synchronize()
                if turn:  # the first epoch of each is for warming up
                    seconds[name].append(time.perf_counter() - started_s)
            trainer.epoch, trainer.batch = trainer.epoch + 1, 0
    images = options.batches * options.batch_size
    rates = {name: images / statistics.median(values) for name, values in seconds.items()}
    ratio = rates["trainer"] / rates["bare"]
    return {
        "benchmark": "step",
        "passed": ratio >= (LEAST_RATIO_ON_A_GPU if gpu else LEAST_RATIO),
        "ratio": round(ratio, 4),
        "trainer_images_per_s": round(rates["trainer"], 1),
        "bare_images_per_s": round(rates["bare"], 1),
        "architecture": options.architecture,
        "side_px": options.side_px,
        "batch_size": options.batch_size,
        "mixed_precision": plan.mixed_precision,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


class InMemory(TileTask):
    """Made-up tiles that are decoded already."""

    def __init__(self, plan: recipe.Recipe, tiles: int) -> None:
        record = SlideRecord("made up", "0", "nobody", 0, plan.spec.class_names[0], Path())
        super().__init__(plan, Split((record,), (), (record,)), [SlideTiles(record, [b""])] * 2, {})
        side_px = plan.spec.input_size_px
        generator = np.random.default_rng(0)
        self.tiles_NHWC = torch.from_numpy(
            generator.integers(0, 256, (tiles, side_px, side_px, 3), dtype=np.uint8)
        )
        self.labels_N = torch.arange(tiles) % len(plan.spec.class_names)
        self.train_set = _Decoded(self.tiles_NHWC, self.labels_N)  # type: ignore[assignment]


class _Decoded(TensorDataset):
    def __init__(self, tiles_NHWC: torch.Tensor, labels_N: torch.Tensor) -> None:
        super().__init__(tiles_NHWC, labels_N, torch.arange(len(labels_N)))
        self.labels = labels_N.tolist()

    def set_epoch(self, epoch: int) -> None:
        """These tiles are the same in every epoch."""


def _trainer(plan: recipe.Recipe, task: InMemory, state: Path) -> Training:
    accelerator = processes.make_accelerator(plan)
    keeper = resume.StateKeeper(state, {}, process=0, processes=1, save_every_s=plan.save_every_s)
    return Training(plan, task, accelerator, keeper, None)


class Bare:
    """What one would write without a library."""

    def __init__(self, plan: recipe.Recipe, task: InMemory, device: torch.device) -> None:
        self.plan, self.device = plan, device
        torch.manual_seed(plan.seed)
        self.network = build(plan.architecture, plan.spec).to(device)
        if plan.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network.train()
        groups = optimisation.parameter_groups(self.network, None, weight_decay=plan.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate)
        self.loss = nn.CrossEntropyLoss(label_smoothing=plan.label_smoothing)
        self.loader = DataLoader(
            TensorDataset(task.tiles_NHWC, task.labels_N),
            batch_size=plan.batch_size,
            shuffle=True,
            drop_last=True,
            pin_memory=device.type == "cuda",
        )

    def epoch(self) -> None:
        """All batches once."""
        autocast = torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.plan.mixed_precision == "bf16"
        )
        for tiles_NHWC, labels_N in self.loader:
            tiles_NHWC = tiles_NHWC.to(self.device, non_blocking=True)
            labels_N = labels_N.to(self.device, non_blocking=True)
            with autocast:
                loss = self.loss(self.network(tiles_NHWC), labels_N)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), self.plan.max_gradient_norm)
            self.optimizer.step()
