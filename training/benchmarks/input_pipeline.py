"""python -m training.benchmarks input-pipeline

Images/s of the loader alone (JPEG tiles out of slides or a folder: read, decoded, resized, augmented, collated, with the
workers of the recipe) against what a step of the recipe's network consumes on this machine.
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

import torch
from torch import nn
from tqdm import tqdm

from slides.demo import make_demo_slides
from slides.labels import read_labels
from training import optimisation, processes, recipe
from training.folds import split_by_patient
from training.network import build
from training.order import EpochOrder, make_loader
from training.task import Split
from training.tile_task import TileTask

LEAST_RATIO = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="demo", help="name or path (default: %(default)s)")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="of the recipe; default: demo slides, made for this"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="of each measurement (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Bar: three times what the step consumes."""
    plan = recipe.load(options.recipe)
    accelerator = processes.make_accelerator(plan)
    with tempfile.TemporaryDirectory() as scratch:
        data = options.data
        if data is None:
            data = Path(scratch) / "demo"
            make_demo_slides(data, slides=8, patients=8, centers=2, seed=5, size_px=(4096, 4096))
        records = read_labels(data, class_names=plan.spec.class_names)
        train, held_out = split_by_patient(records, folds=2, held_out_fold=0, seed=plan.seed)
        task = TileTask.load(plan, data, Split((*train, *held_out), (), tuple(held_out)))
        fed, consumed = [], []
        network = _Network(plan, accelerator.device)
        for _ in tqdm(range(options.repeats), desc="measurements", file=sys.stderr):
            fed.append(_loader_rate(plan, task, accelerator.device))
            consumed.append(network.rate())
    feeds, consumes = statistics.median(fed), statistics.median(consumed)
    return {
        "benchmark": "input-pipeline",
        "passed": feeds >= LEAST_RATIO * consumes,
        "ratio": round(feeds / consumes, 2),
        "loader_images_per_s": round(feeds, 1),
        "step_images_per_s": round(consumes, 1),
        "recipe": options.recipe,
        "tile_px": plan.spec.tile_size_px,
        "input_px": plan.spec.input_size_px,
        "workers": plan.workers,
        "device": accelerator.device.type,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def _loader_rate(plan: recipe.Recipe, task: TileTask, device: torch.device) -> float:
    order = EpochOrder(len(task.train_set), plan.batch_size, seed=plan.seed)
    loader = make_loader(task.train_set, order, workers=plan.workers, device=device, seed=plan.seed)
    images, started_s = 0, time.perf_counter()
    for _, labels_N, _ in loader:
        images += len(labels_N)
    return images / (time.perf_counter() - started_s)


class _Network:
    """Steps on one batch that is on the device already."""

    def __init__(self, plan: recipe.Recipe, device: torch.device) -> None:
        side_px = plan.spec.input_size_px
        self.tiles_NHWC = torch.randint(0, 256, (plan.batch_size, side_px, side_px, 3), dtype=torch.uint8).to(
            device
        )
        self.labels_N = (torch.arange(plan.batch_size) % len(plan.spec.class_names)).to(device)
        self.network = build(plan.architecture, plan.spec).to(device).train()
        groups = optimisation.parameter_groups(self.network, None, weight_decay=plan.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-5)
        self.rate()

    def rate(self, steps: int = 5) -> float:
        """Images/s of so many steps."""
        started_s = time.perf_counter()
        for _ in range(steps):
            loss = nn.functional.cross_entropy(self.network(self.tiles_NHWC), self.labels_N)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        float(loss)  # waits for the device
        return steps * len(self.labels_N) / (time.perf_counter() - started_s)
