"""One run of training: epochs, batches, checks, saves.

Between two moves of the weights a run is a value (`Learner.state` and a position), so it can be saved there and goes
on from there to the bit. Processes talk to each other about once a second, not once a step.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import accelerate
import numpy as np
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from training import optimisation, throughput
from training.answers import predict
from training.early_stopping import EarlyStopping
from training.errors import DataError, DivergedError
from training.learner import Learner
from training.order import EpochOrder, make_loader
from training.processes import all_numbers, on_main_process
from training.recipe import Recipe
from training.resume import StateKeeper
from training.scores import accuracy
from training.task import Items, Task

SECONDS_BETWEEN_CHECKS = 1.0
MOST_STEPS_BETWEEN_CHECKS = 200
WATCHED = "patient_log_loss"

OnSnapshot: TypeAlias = Callable[[int, nn.Module, NDArray[np.float32]], None]
"""Called on the main process with the number of a cycle (from 1), its network, and its answers to the held-out set."""


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What training leaves behind.

    Attributes:
        model: on the CPU, in evaluation mode, FP32.
        held_out_probabilities_NK: FP32 [N, K], row n for item n of the held-out set, from the weights of `model`.
        history: one entry an epoch: epoch (from 1), train_loss, learning_rate (of its last step), accuracy on held-out
            items, scores of the validation set where there is one, speed and memory (`training.throughput`).
        best_epoch: the epoch whose weights these are.
    """

    model: nn.Module
    held_out_probabilities_NK: NDArray[np.float32]
    history: list[dict[str, float]]
    best_epoch: int


class Training:
    """A run as it goes: a learner, and a position in the order of items. `train` is all that most code needs.

    Attributes:
        epoch: from 1, the one that is being learnt.
        batch: batches of it that are done.
    """

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        accelerator: accelerate.Accelerator,
        keeper: StateKeeper | None,
        on_snapshot: OnSnapshot | None,
    ) -> None:
        self.recipe, self.task, self.accelerator = recipe, task, accelerator
        self.keeper, self.on_snapshot = keeper, on_snapshot
        self.order = EpochOrder(
            len(task.train_set),
            recipe.batch_size,
            seed=recipe.seed,
            accumulation=recipe.gradient_accumulation_steps,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        _refuse_too_few(task, recipe, self.order)
        self.epoch, self.batch = 1, 0
        self.history: list[dict[str, float]] = []
        self.stopping = EarlyStopping(recipe.early_stopping_patience)
        self.best_weights: dict[str, Any] | None = None
        self.throughput = throughput.Throughput()
        self.probabilities_NK: NDArray[np.float32] | None = None
        found = on_main_process(keeper.find) if keeper is not None else None
        self.learner = Learner(
            recipe,
            task,
            accelerator,
            steps=recipe.epochs * self.order.windows,
            resumes=found is not None,
        )
        if keeper is not None and found is not None:
            self.learner.warm_up(task.train_set)
            self._load(*keeper.load(found))
        self._next_check = self.learner.step + 1
        self._checked_loss = (0.0, 0.0)
        self._saved_s = time.monotonic()

    def learn_epoch(self) -> None:
        """The batches of this epoch that are not done yet."""
        self.order.start(self.epoch, self.batch)
        self.task.train_set.set_epoch(self.epoch)
        if self.batch == 0:
            self.learner.start_epoch()
            self._checked_loss = (0.0, 0.0)
        loader = make_loader(
            self.task.train_set,
            self.order,
            workers=self.recipe.workers,
            device=self.accelerator.device,
            seed=self.recipe.seed,
        )
        with self._bar() as bar, self.throughput.running():
            batches = iter(loader)
            for batch in range(self.batch, self.order.batches):
                asked_s = time.perf_counter()
                inputs, labels_N, _ = next(batches)
                self.throughput.waited(asked_s)
                inputs, labels_N = send_to_device(
                    (inputs, labels_N), self.accelerator.device, non_blocking=True
                )
                moved = self.learner.learn(inputs, labels_N, epoch=self.epoch, batch=batch, order=self.order)
                self.batch = batch + 1
                self.throughput.count(len(labels_N), moved)
                bar.update()
                if moved and (self.learner.step >= self._next_check or self.batch == self.order.batches):
                    self._check(bar)

    def _bar(self) -> Any:
        return tqdm(
            desc=f"epoch {self.epoch}/{self.recipe.epochs}",
            total=self.order.batches,
            initial=self.batch,
            unit="batch",
            file=sys.stderr,
            disable=not self.accelerator.is_main_process,
        )

    def _check(self, bar: Any) -> None:
        """All processes together: is the loss a number, when is the next check, is it time to save?"""
        step = self.learner.step
        due = self.keeper is not None and time.monotonic() - self._saved_s >= self.keeper.save_every_s
        rows = all_numbers(
            [self.learner.loss_sum, self.learner.loss_weight, float(due), self._steps_until_check()],
            self.accelerator,
        )
        loss_sum, loss_weight = sum(row[0] for row in rows), sum(row[1] for row in rows)
        before_sum, before_weight = self._checked_loss
        loss = (loss_sum - before_sum) / max(loss_weight - before_weight, 1e-12)
        _refuse_diverged(loss_sum, f"in epoch {self.epoch}, step {step}", self.recipe)
        self._checked_loss = (loss_sum, loss_weight)
        self._next_check = step + int(rows[0][3])
        rate = self.learner.last_rate
        speed = self.throughput.told(self.accelerator.num_processes)
        bar.set_postfix_str(
            f"loss {loss:.3f}, rate {rate:.2g}, {speed['images_per_s']:.0f} images/s", refresh=False
        )
        self.accelerator.log({"step_loss": loss, "learning_rate": rate, **speed}, step=step)
        if rows[0][2]:
            with self.throughput.paused():
                self._save()

    def _steps_until_check(self) -> float:
        step_s = self.throughput.told(1)["step_s"]
        longest_s = SECONDS_BETWEEN_CHECKS
        if self.keeper is not None:
            longest_s = min(longest_s, self.keeper.save_every_s)
        return float(min(MOST_STEPS_BETWEEN_CHECKS, max(1, int(longest_s / step_s))))

    def close_epoch(self) -> None:
        """Answer what is held out and what is watched, write the history, save."""
        rows = all_numbers([self.learner.loss_sum, self.learner.loss_weight], self.accelerator)
        entry: dict[str, float] = {
            "epoch": self.epoch,
            "train_loss": sum(row[0] for row in rows) / sum(row[1] for row in rows),
            "learning_rate": self.learner.last_rate,
        }
        with self.learner.answering() as network:
            self.probabilities_NK = predict(network, self.task.held_out_set, self.recipe, self.accelerator)
            entry[f"held_out_{self.task.item_name}_accuracy"] = accuracy(
                self.task.held_out_set.labels, self.probabilities_NK
            )
            if self.task.validation_set is not None:
                entry |= self._validate(network, self.task.validation_set)
            self._keep_snapshot()
        entry |= self.throughput.told(self.accelerator.num_processes)
        entry |= throughput.memory(self.accelerator.device)
        self._tell(entry)
        self.history.append(entry)
        self.epoch, self.batch, self.throughput = self.epoch + 1, 0, throughput.Throughput()
        self._save()

    def _validate(self, network: nn.Module, watched: Items) -> dict[str, float]:
        probabilities_NK = predict(network, watched, self.recipe, self.accelerator)
        scores = self.task.scores(watched, probabilities_NK)
        if self.recipe.early_stopping_patience and self.stopping.update(self.epoch, scores[WATCHED]):
            self.best_weights = self.learner.weights()
        return {f"validation_{name}": value for name, value in scores.items() if math.isfinite(value)}

    def _keep_snapshot(self) -> None:
        ends = optimisation.snapshot_epochs(self.recipe.schedule, self.recipe.epochs, self.recipe.cycles)
        if self.epoch not in ends or self.on_snapshot is None:
            return
        weights = self.learner.weights()
        if self.accelerator.is_main_process and self.probabilities_NK is not None:
            self.on_snapshot(ends.index(self.epoch) + 1, self._built(weights), self.probabilities_NK)

    def _tell(self, entry: dict[str, float]) -> None:
        self.accelerator.log(entry, step=self.learner.step)
        if self.accelerator.is_main_process:
            tqdm.write(throughput.line(entry, self.recipe.epochs), file=sys.stderr)

    def result(self) -> TrainingResult:
        """The network as it was before Accelerate wrapped it, and its own answers."""
        if self.best_weights is not None:
            weights, answered = self.best_weights, False
        else:
            with self.learner.answering():
                weights, answered = self.learner.weights(), not self.recipe.channels_last
        trained = self._built(weights)
        probabilities_NK = self.probabilities_NK if answered else None
        if probabilities_NK is None:
            trained.to(self.accelerator.device)
            probabilities_NK = predict(trained, self.task.held_out_set, self.recipe, self.accelerator)
        if self.keeper is not None:
            self.keeper.wait()
        best_epoch = self.stopping.best_epoch if self.best_weights is not None else self.epoch - 1
        return TrainingResult(trained.cpu(), probabilities_NK, self.history, int(best_epoch or 0))

    def _built(self, weights: dict[str, Any]) -> nn.Module:
        built = self.task.build_network(weights=False)
        built.load_state_dict(weights)
        return built.eval()

    def _save(self) -> None:
        if self.keeper is None:
            return
        shared, own = self.learner.state()
        position = {
            "epoch": self.epoch,
            "batch": self.batch,
            "history": self.history,
            "stopping": self.stopping.state_dict(),
            "best_weights": self.best_weights,
            "pretrained": self.task.pretrained,
        }
        self.keeper.save({**shared, **position}, {**own, "throughput": dataclasses.asdict(self.throughput)})
        self._saved_s = time.monotonic()

    def _load(self, shared: dict[str, Any], own: dict[str, Any]) -> None:
        self.learner.load_state(shared, own)
        self.epoch, self.batch, self.history = shared["epoch"], shared["batch"], shared["history"]
        self.stopping.load_state_dict(shared["stopping"])
        self.best_weights, self.task.pretrained = shared["best_weights"], shared["pretrained"]
        self.throughput = throughput.Throughput(**own["throughput"])
        if self.accelerator.is_main_process:
            print(
                f"going on in epoch {self.epoch} of {self.recipe.epochs}, batch {self.batch + 1} of "
                f"{self.order.batches}, where this training was interrupted",
                file=sys.stderr,
            )


def _refuse_too_few(task: Task, recipe: Recipe, order: EpochOrder) -> None:
    if not order.batches:
        items_a_step = recipe.batch_size * order.processes
        raise DataError(
            f"training {task.item_name}s",
            [
                f"there are {len(task.train_set)}, one step takes {items_a_step}; lower batch_size or add slides"
            ],
        )


def _refuse_diverged(loss_sum: float, where: str, recipe: Recipe) -> None:
    if not math.isfinite(loss_sum):
        raise DivergedError(
            f"the loss became {loss_sum} {where}, with learning_rate {recipe.learning_rate:g} and mixed_precision "
            f"{recipe.mixed_precision!r}; lower learning_rate or max_gradient_norm, or look for tiles with impossible "
            "labels; no checkpoint was written"
        )
