"""The training loop, on Accelerate: one process or many, CPU or GPU, the same code."""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import sys
from typing import Any

import accelerate
import numpy as np
import torch
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, broadcast
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from training import network
from training.errors import DataError, DivergedError
from training.recipe import Recipe
from training.scores import accuracy
from training.tiles import TileDataset, usable_cores


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What training leaves behind.

    Attributes:
        model: on the CPU, in evaluation mode, FP32.
        held_out_probabilities_NK: FP32 [N, K], row n for tile n of the held-out dataset, from the weights of `model`.
        history: one entry an epoch: epoch (from 1), train_loss, learning_rate (at its end), held_out_tile_accuracy.
    """

    model: network.TileNetwork
    held_out_probabilities_NK: NDArray[np.float32]
    history: list[dict[str, float]]


def make_accelerator(recipe: Recipe) -> accelerate.Accelerator:
    """Accelerate, set up for `recipe`; on a CPU, torch gets this process's share of the cores.

    Processes wait for each other as long as the first one needs to cut all tiles (12 hours at most).
    """
    accelerator = accelerate.Accelerator(
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=recipe.seed),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=12))],
    )
    if accelerator.device.type == "cpu":
        # `accelerate launch` sets OMP_NUM_THREADS to 1, which would leave all cores but one idle.
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(max(1, usable_cores() // max(1, processes)))
    return accelerator


def train(
    recipe: Recipe, train_set: TileDataset, held_out_set: TileDataset, accelerator: accelerate.Accelerator
) -> TrainingResult:
    """Train for all epochs and keep the last weights: choosing an epoch by held-out tiles would flatter the scores.

    Raises:
        ArchitectureError: as `network.build`.
        DataError: fewer tiles than one step of all processes takes.
        DivergedError: the loss of any process is infinite or not a number.
    """
    tiles_a_step = recipe.batch_size * accelerator.num_processes
    if len(train_set) < tiles_a_step:
        raise DataError(
            "training tiles",
            [f"there are {len(train_set)}, one step takes {tiles_a_step}; lower batch_size or add slides"],
        )
    accelerate.utils.set_seed(recipe.seed)
    model: Any = network.build(recipe.architecture, recipe.spec, pretrained=recipe.pretrained)
    optimizer: Any = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    loader: Any = DataLoader(
        train_set, batch_size=recipe.batch_size, shuffle=True, drop_last=True, num_workers=recipe.workers
    )
    held_out_loader: Any = DataLoader(held_out_set, batch_size=recipe.batch_size, num_workers=recipe.workers)
    model, optimizer, loader, held_out_loader = accelerator.prepare(model, optimizer, loader, held_out_loader)
    loss_of = nn.CrossEntropyLoss(
        weight=class_weights(train_set).to(accelerator.device), label_smoothing=recipe.label_smoothing
    )
    steps = recipe.epochs * math.ceil(len(loader) / recipe.gradient_accumulation_steps)
    step, history = 0, []
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        loader.set_epoch(epoch)
        losses: list[float] = []
        with tqdm(
            loader,
            desc=f"epoch {epoch}/{recipe.epochs}",
            unit="batch",
            file=sys.stderr,
            disable=not accelerator.is_main_process,
        ) as batches:
            for tiles_NHWC, labels_N, _ in batches:
                with accelerator.accumulate(model):
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(step, steps, recipe)
                    with accelerator.autocast():
                        loss = loss_of(model(tiles_NHWC), labels_N)
                    losses.append(_checked(loss, accelerator, epoch, step, recipe))
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
                        step += 1
                    optimizer.step()
                    optimizer.zero_grad()
                batches.set_postfix(loss=f"{losses[-1]:.3f}")
        probabilities_NK = predict(model, held_out_loader, accelerator)
        history.append(
            {
                "epoch": epoch,
                "train_loss": float(np.mean(losses)),
                "learning_rate": float(optimizer.param_groups[0]["lr"]),
                "held_out_tile_accuracy": accuracy(held_out_set.labels, probabilities_NK),
            }
        )
    # A fresh network, so that nothing that Accelerate wrapped around the trained one is exported or pickled with it.
    trained = network.build(recipe.architecture, recipe.spec)
    trained.load_state_dict(accelerator.unwrap_model(model).state_dict())
    return TrainingResult(trained, probabilities_NK, history)


def predict(model: Any, loader: Any, accelerator: accelerate.Accelerator) -> NDArray[np.float32]:
    """Probabilities FP32 [N, K] of all tiles of `loader`, in the order of its dataset, the same on every process.

    Without autocast: what is measured is the FP32 network that is served.
    """
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    for (
        buffer
    ) in plain.buffers():  # running statistics differ between processes; the first process's are saved
        buffer.copy_(broadcast(buffer.detach().clone()))
    plain.eval()
    probabilities, indices = [], []
    with torch.inference_mode():
        for tiles_NHWC, _, index_N in loader:
            batch = (torch.softmax(plain(tiles_NHWC), dim=1), index_N)
            batch_NK, rows_N = accelerator.gather_for_metrics(batch)
            probabilities.append(batch_NK.cpu().numpy())
            indices.append(rows_N.cpu().numpy())
    order_N = np.argsort(np.concatenate(indices), kind="stable")
    return np.concatenate(probabilities)[order_N]


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine to 0 (Loshchilov and Hutter 2017, one cycle); `step` counts from 0."""
    warmup_steps = recipe.warmup_share * steps
    if step < warmup_steps:
        return recipe.learning_rate * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1.0, steps - warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def class_weights(dataset: TileDataset) -> torch.Tensor:
    """FP32 [K], inverse to the number of tiles of each class, so that every class weighs the same; mean over tiles 1.

    A class without a tile gets weight 0.
    """
    counts_K = np.bincount(dataset.labels, minlength=len(dataset.spec.class_names))
    weights_K = np.divide(
        len(dataset), len(counts_K) * counts_K, out=np.zeros(len(counts_K)), where=counts_K > 0
    )
    return torch.tensor(weights_K, dtype=torch.float32)


def _checked(
    loss: torch.Tensor, accelerator: accelerate.Accelerator, epoch: int, step: int, recipe: Recipe
) -> float:
    """The mean loss of all processes; they all stop together where one of them has diverged."""
    mean = float(accelerator.gather(loss.detach().reshape(1)).mean())
    if not math.isfinite(mean):
        raise DivergedError(
            f"the loss became {mean} in epoch {epoch}, step {step}, with learning_rate {recipe.learning_rate:g} and "
            f"mixed_precision {recipe.mixed_precision!r}; lower learning_rate or max_gradient_norm, or look for tiles with impossible labels; nothing was saved"
        )
    return mean
