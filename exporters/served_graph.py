"""The graphs that are served: uint8 tiles in, probabilities out; or for an encoder, its embedding.

Normalisation is one multiply-add, since (x / 255 - mean) / std = x * 1 / (255 std) - mean / std. It stays
apart from the first convolution: that one pads with zeros *after* normalisation, so the shift cannot be
folded into its bias without changing the border.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn


class _TileGraph(nn.Module):
    """uint8 tiles [N, S, S, 3] -> what the backbone makes of them, normalised.

    Args:
        backbone: float32 [N, 3, S, S] normalised RGB -> float32 [N, ...]. A copy is taken.
        mean: three numbers, of RGB in 0..1.
        std: three numbers, of RGB in 0..1.
        channels_last: keep the pixels of a tile interleaved, as they arrive, and the weights with them: no
            transpose at all, and faster convolutions in PyTorch on the CPU. Otherwise planes are made by
            a transpose of the bytes, before they become floats four times their size.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float], *, channels_last: bool
    ) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone).to("cpu", torch.float32).eval().requires_grad_(False)
        self.channels_last = channels_last
        if channels_last:
            self.backbone = self.backbone.to(memory_format=torch.channels_last)
        mean_c, std_c = np.asarray(mean, np.float64), np.asarray(std, np.float64)
        self.register_buffer("scale", _per_channel(1.0 / (255.0 * std_c)))
        self.register_buffer("shift", _per_channel(-mean_c / std_c))

    def normalised(self, tiles: torch.Tensor) -> torch.Tensor:
        planes = tiles.permute(0, 3, 1, 2)
        if not self.channels_last:
            planes = planes.contiguous()
        return planes.to(torch.float32) * self.scale + self.shift


class EmbeddingGraph(_TileGraph):
    """uint8 tiles [N, S, S, 3] -> embedding FP32 [N, D]; arguments as `ServedGraph`, the backbone gives the embedding."""

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """See the class."""
        embedding: torch.Tensor = self.backbone(self.normalised(tiles))
        return embedding


class ServedGraph(_TileGraph):
    """uint8 tiles [N, S, S, 3] -> (probabilities FP32 [N, K], confidence FP32 [N, 1], label_index INT64 [N, 1]).

    The backbone gives logits FP32 [N, K].
    """

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See the class."""
        logits = self.backbone(self.normalised(tiles))
        probabilities = torch.softmax(logits, dim=1)
        confidence, label_index = probabilities.max(dim=1, keepdim=True)
        return probabilities, confidence, label_index


def _per_channel(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).reshape(1, 3, 1, 1)
