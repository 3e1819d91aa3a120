"""What a network computes for one tile: counted, so that it is the same at every hour and on every machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

COLOURS = 3


@dataclass(frozen=True)
class NetworkWork:
    """What a network computes for one tile.

    Attributes:
        multiply_adds: of its convolutions and matrix products.
        layers: convolutions and linear layers; each costs something besides its multiply-adds.
    """

    multiply_adds: int
    layers: int


def network_work(backbone: nn.Module, input_size_px: int) -> NetworkWork:
    """Count, by one execution.

    Args:
        backbone: float32 [N, 3, S, S] -> float32 [N, K] or [N, D]; on the CPU, in evaluation mode.
        input_size_px: S.
    """
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        backbone(torch.zeros(1, COLOURS, input_size_px, input_size_px))
    layers = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in backbone.modules())
    return NetworkWork(counter.get_total_flops() // 2, layers)  # it counts a multiply-add as two
