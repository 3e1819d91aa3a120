"""A moving average of the weights, which is scored and saved in place of the last weights.

BatchNorm's running statistics belong to the weights that made them. They are averaged with the same decay as the weights:
statistics of averaged weights are, to first order, the average of the statistics. Copying the newest ones would
pair averaged weights with statistics of other, newer weights. Counters (integers) are copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from training.errors import CheckpointError


class WeightAverage:
    """average <- d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) at update n.

    The lower decay of the first updates (TensorFlow's `ExponentialMovingAverage`) lets the noise of the start fade, which
    would otherwise make up decay ** n of the average. Kept in FP32 whatever the weights are in; frozen parameters are
    not kept twice. Of weights that are sharded over processes (FSDP2) every process averages its own shards.

    Args:
        model: as Accelerate has prepared it, unwrapped: on its device, with the tensors that the optimizer moves.
        decay: 0..1, exclusive; the average reaches back some 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        live = {
            name: _local(value)
            for name, value in model.state_dict(keep_vars=True).items()
            if name not in frozen
        }
        self._live = {name: value for name, value in live.items() if value.is_floating_point()}
        self._live_counters = {name: value for name, value in live.items() if not value.is_floating_point()}
        self._average = {name: value.to(torch.float32, copy=True) for name, value in self._live.items()}
        self._counters = {name: value.clone() for name, value in self._live_counters.items()}
        self._gathering = [module for module in model.modules() if hasattr(module, "reshard")]

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in: once after every move of the weights, not within an accumulation window."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        live = [value.to(torch.float32) for value in self._live.values()]
        torch._foreach_lerp_(list(self._average.values()), live, 1 - decay)
        for name, value in self._live_counters.items():
            self._counters[name].copy_(value)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights inside the block, and bit for bit its own ones afterwards."""
        live = {**self._live, **self._live_counters}
        kept = {name: value.clone() for name, value in live.items()}
        try:
            _copy({**self._average, **self._counters}, live)
            self._forget_gathered()
            yield
        finally:
            _copy(kept, live)
            self._forget_gathered()

    def _forget_gathered(self) -> None:
        """FSDP keeps weights that it gathered for an answer until the next backward pass; they are old now."""
        for module in self._gathering:
            module.reshard()  # type: ignore[operator]

    def state_dict(self) -> dict[str, Any]:
        """`updates` and `tensors` by their names in the model: this process's, not copied."""
        return {"updates": self.updates, "tensors": {**self._average, **self._counters}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            CheckpointError: it is the state of another network.
        """
        own = {**self._average, **self._counters}
        tensors = state["tensors"]
        wrong = sorted(own.keys() ^ tensors.keys())
        wrong += sorted(
            name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape
        )
        if wrong:
            raise CheckpointError(
                f"the moving average is of another network: {len(wrong)} tensors do not fit ({', '.join(wrong[:3])})"
            )
        _copy(tensors, own)
        self.updates = int(state["updates"])


def _local(value: Any) -> torch.Tensor:
    """The tensor itself, or this process's shard of it, without its history."""
    value = value.detach()
    return value.to_local() if hasattr(value, "to_local") else value


@torch.no_grad()
def _copy(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    for name, value in source.items():
        target[name].copy_(value)
