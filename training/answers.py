"""Probabilities for items, from a network on one process or many."""

from __future__ import annotations

import accelerate
import numpy as np
import torch
from accelerate.utils import DistributedType, send_to_device
from numpy.typing import NDArray
from torch import nn

from training.order import ShareOrder, make_loader
from training.recipe import Recipe
from training.task import Items


def predict(
    network: nn.Module, items: Items, recipe: Recipe, accelerator: accelerate.Accelerator
) -> NDArray[np.float32]:
    """Probabilities FP32 [N, K] of all items, in their order, the same on every process.

    Without autocast and without torch.compile: what is measured is the network that is served.

    Args:
        network: in evaluation mode on every process, with the same weights.
    """
    order = ShareOrder(
        len(items), recipe.batch_size, process=accelerator.process_index, processes=accelerator.num_processes
    )
    loader = make_loader(items, order, workers=recipe.workers, device=accelerator.device, seed=recipe.seed)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    answer = network if sharded else network.forward  # the call of a compiled network is the compiled one
    probabilities, indices = [], []
    with torch.inference_mode():
        for inputs, _, indices_N in loader:
            logits_NK = answer(send_to_device(inputs, accelerator.device, non_blocking=True))
            probabilities.append(torch.softmax(logits_NK.float(), dim=1))
            indices.append(indices_N.to(accelerator.device))
        own_NK, own_N = torch.cat(probabilities), torch.cat(indices)
        all_NK = accelerator.gather(accelerator.pad_across_processes(own_NK))
        all_N = accelerator.gather(accelerator.pad_across_processes(own_N, pad_index=-1))
    index_N, first_N = np.unique(all_N.cpu().numpy(), return_index=True)
    kept_N = first_N[index_N >= 0]
    result: NDArray[np.float32] = all_NK.cpu().numpy()[kept_N]
    return result
