"""A network and everything that moves its weights, and all of it as a value that can be saved and restored."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import accelerate
import numpy as np
import torch
from accelerate.utils import DistributedType, send_to_device
from torch import nn
from torch.utils import _pytree

from training import mixing, network, optimisation, random_state
from training.ema import WeightAverage
from training.order import EpochOrder, make_loader
from training.recipe import Recipe
from training.task import Items, Task


class Learner:
    """What one process trains with.

    Attributes:
        network: as the task built it, on this process's device; answers without autocast.
        model: the same weights, wrapped for several processes.
        step: moves of the weights so far.
        last_rate: learning rate of the head in the last of them.
        loss_sum, loss_weight: of the epoch so far, this process's batches; their quotient is the mean loss.
    """

    def __init__(
        self, recipe: Recipe, task: Task, accelerator: accelerate.Accelerator, *, steps: int, resumes: bool
    ) -> None:
        """
        Args:
            steps: moves of the weights in the whole run.
            resumes: the weights do not matter, `load_state` follows.
        """
        self.recipe = recipe
        self.accelerator = accelerator
        self.steps = steps
        self.step = 0
        self.last_rate = 0.0
        accelerate.utils.set_seed(recipe.seed)
        built = task.build_network(weights=not resumes)
        backbone, classifier = task.backbone_of(built)
        self._frozen: Sequence[nn.Module] = ()
        if backbone is not None:
            self._frozen = optimisation.freeze(backbone, recipe.freeze, classifier=classifier)
        groups = optimisation.parameter_groups(
            built,
            backbone,
            classifier=classifier,
            weight_decay=recipe.weight_decay,
            backbone_learning_rate_factor=recipe.backbone_learning_rate_factor,
            layer_decay=recipe.layer_decay,
        )
        optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate)
        self.model, self.optimizer = accelerator.prepare(self._as_recipe_says(built), optimizer)
        # Autocast is entered in `learn`, in so many words; the network itself is the FP32 one that is served.
        self.network = accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.average = WeightAverage(self.network, recipe.ema_decay) if recipe.ema_decay else None
        self._weights_K = class_weights(task, recipe).to(accelerator.device)
        self._weight_of_item = (
            self._weights_K.cpu().numpy()[np.asarray(task.train_set.labels)].astype(np.float64)
        )
        self._window_weight = 0.0
        self.start_epoch()
        # From here on every process draws its own numbers (dropout).
        accelerate.utils.set_seed(recipe.seed, device_specific=True)

    def _as_recipe_says(self, built: nn.Module) -> nn.Module:
        if self.recipe.channels_last:
            network.to_channels_last(built)
        if self.recipe.sync_batch_norm:
            built, line = network.sync_batch_norm(
                built, device_type=self.accelerator.device.type, processes=self.accelerator.num_processes
            )
            if self.accelerator.is_main_process:
                print(line, file=sys.stderr)
        if self.recipe.compile:
            network.compile_in_place(built)
        return built

    def start_epoch(self) -> None:
        """Training mode, and no loss yet."""
        optimisation.to_training_mode(self.model, self._frozen)
        self.loss_sum = torch.zeros((), device=self.accelerator.device)
        self.loss_weight = torch.zeros((), device=self.accelerator.device)

    def learn(
        self, inputs: Any, labels_N: torch.Tensor, *, epoch: int, batch: int, order: EpochOrder
    ) -> bool:
        """Add the gradient of one batch, and move the weights where it ends an accumulation window.

        The loss of a window is the weighted mean over all items that it holds, on all processes: as if they had been
        one batch. Nothing here waits for the device.

        Args:
            batch: of this epoch, from 0, as `order` counts.

        Returns:
            Whether the weights moved (or would have, had fp16 not overflowed).
        """
        if batch % order.accumulation == 0:
            self._window_weight = float(self._weight_of_item[order.window_items(batch)].sum())
        ends_window = (batch + 1) % order.accumulation == 0 or batch + 1 == order.batches
        targets = labels_N
        if self.recipe.mixup_alpha:
            drawn = mixing.generator(self.recipe.seed, epoch, batch, self.accelerator.process_index)
            inputs, targets = mixing.mixup(
                inputs,
                labels_N,
                classes=len(self._weights_K),
                alpha=self.recipe.mixup_alpha,
                generator=drawn,
            )
        with contextlib.nullcontext() if ends_window else self.accelerator.no_sync(self.model):
            with self.accelerator.autocast():
                logits_NK = self.model(inputs)
            loss_sum, weight_sum = mixing.weighted_cross_entropy(
                logits_NK.float(),
                targets,
                class_weights_K=self._weights_K,
                label_smoothing=self.recipe.label_smoothing,
            )
            if batch % order.accumulation == 0:
                # Not right after the step: malloc would give the memory back, and backward get it anew page by page.
                self.optimizer.zero_grad()
            # Gradients are averaged over the processes, so each one's share of the sum is multiplied by their number.
            self.accelerator.backward(loss_sum * (self.accelerator.num_processes / self._window_weight))
        self.loss_sum += loss_sum.detach()
        self.loss_weight += weight_sum
        if ends_window:
            self._move()
        return ends_window

    def _move(self) -> None:
        self.last_rate = self.learning_rate()
        optimisation.set_learning_rate(self.optimizer, self.last_rate)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_gradient_norm)
        self.optimizer.step()
        if self.average is not None and not self.accelerator.optimizer_step_was_skipped:
            self.average.update()
        self.step += 1

    def learning_rate(self) -> float:
        """The rate of the head in the step that comes next."""
        share = optimisation.learning_rate_share(
            self.step,
            self.steps,
            schedule=self.recipe.schedule,
            warmup_share=self.recipe.warmup_share,
            cycles=self.recipe.cycles,
        )
        return self.recipe.learning_rate * share

    @contextlib.contextmanager
    def answering(self) -> Iterator[nn.Module]:
        """The network as it is scored and saved: averaged weights where there are any, evaluation mode, FP32."""
        with self.average.in_place() if self.average is not None else contextlib.nullcontext():
            # Running statistics differ between processes, averaged ones too; those of the first one are taken.
            for buffer in self.network.buffers():
                buffer.copy_(accelerate.utils.broadcast(buffer.detach().clone()))
            self.model.eval()
            yield self.model if self._sharded else self.network

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the state dict of `network`, on the CPU, whole on every process."""
        if self._sharded:
            gathered = [self.accelerator.get_state_dict(self.model)]  # on the main process only
            return accelerate.utils.broadcast_object_list(gathered)[0]  # type: ignore[no-any-return]
        return {
            name: value.detach().to("cpu", copy=True) for name, value in self.network.state_dict().items()
        }

    def warm_up(self, items: Items) -> None:
        """One forward and backward pass of which nothing stays, before `load_state`.

        DistributedDataParallel arranges its buckets anew after its first backward pass. With three processes or more
        the order of additions depends on the arrangement, and the run that goes on has to have that of the one that
        was killed.
        """
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            device = self.accelerator.device
            every = [list(range(self.recipe.batch_size))]
            inputs, labels_N, _ = next(iter(make_loader(items, every, workers=0, device=device, seed=0)))
            logits_NK = self.model(send_to_device(inputs, device))
            nn.functional.cross_entropy(logits_NK.float(), labels_N.to(device)).backward()
            self.optimizer.zero_grad()

    @property
    def _sharded(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.FSDP

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what all processes share, this process's own). To be taken between windows: gradients are spent then."""
        scaler = getattr(self.accelerator, "scaler", None)
        moved = {
            "parameters": [_local(parameter) for parameter in self.model.parameters()],
            "optimizer": _pytree.tree_map(_local, self.optimizer.state_dict()),
            "average": _pytree.tree_map(_local, self.average.state_dict())
            if self.average is not None
            else None,
        }
        own = {
            "buffers": [_local(buffer) for buffer in self.model.buffers()],
            "random": random_state.capture(),
            "loss_sum": self.loss_sum,
            "loss_weight": self.loss_weight,
            "shard": moved if self._sharded else None,
        }
        shared = {
            "step": self.step,
            "last_rate": self.last_rate,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "threads": torch.get_num_threads(),
            **({} if self._sharded else moved),
        }
        return shared, own

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Go on from what `state` gave, to the bit."""
        moved = own["shard"] if self._sharded else shared
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), moved["parameters"], strict=True):
                _local(parameter).copy_(value)
            for buffer, value in zip(self.model.buffers(), own["buffers"], strict=True):
                _local(buffer).copy_(value)
        self.optimizer.load_state_dict(self._as_sharded(moved["optimizer"]))
        if self.average is not None:
            self.average.load_state_dict(moved["average"])
        if shared["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(shared["scaler"])
        self.step, self.last_rate = shared["step"], shared["last_rate"]
        self.loss_sum.copy_(own["loss_sum"])
        self.loss_weight.copy_(own["loss_weight"])
        # The order of additions, and with it the last bit, depends on the number of threads.
        torch.set_num_threads(shared["threads"])
        random_state.restore(own["random"])

    def _as_sharded(self, optimizer_state: dict[str, Any]) -> dict[str, Any]:
        """Local tensors of an optimiser's state become shards of the parameters that they belong to."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, entries in optimizer_state["state"].items():
            parameter = parameters[number]
            if hasattr(parameter, "device_mesh"):
                for name, value in entries.items():
                    if isinstance(value, torch.Tensor) and value.ndim:
                        entries[name] = type(parameter.data).from_local(
                            value.to(parameter.device), parameter.device_mesh, parameter.placements
                        )
        return optimizer_state


def class_weights(task: Task, recipe: Recipe) -> torch.Tensor:
    """FP32 [K]: with "balanced" inverse to the number of items of each class, mean over items 1; else ones.

    A class without an item gets weight 0 where classes are balanced.
    """
    classes, items = len(task.class_names), len(task.train_set)
    if recipe.class_weights == "none":
        return torch.ones(classes)
    counts_K = np.bincount(task.train_set.labels, minlength=classes)
    weights_K = np.divide(items, classes * counts_K, out=np.zeros(classes), where=counts_K > 0)
    return torch.tensor(weights_K, dtype=torch.float32)


def _local(value: Any) -> Any:
    """The part of a sharded tensor that lies on this process; anything else as it is."""
    return value.to_local() if hasattr(value, "to_local") else value
