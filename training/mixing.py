"""Mixup (Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization") and the loss for mixed labels."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

_STREAM = 0x6D69786564
"""Ends the seed of `generator`, so that it draws other numbers than the augmentation of a tile."""


def generator(seed: int, epoch: int, step: int, rank: int) -> np.random.Generator:
    """The random numbers of one batch; they depend on nothing else, so a resumed run needs no state of a generator."""
    return np.random.default_rng((seed, epoch, step, rank, _STREAM))


def mixup(
    inputs_NX: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    classes: int,
    alpha: float,
    generator: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend every item of a batch with another one of it, and their labels alike.

    One share from Beta(alpha, alpha) a batch and one permutation of it, as in the authors' code.

    Args:
        inputs_NX: [N, ...], of any dtype; tiles are uint8 [N, S, S, 3]. Not changed.
        labels_N: int64 [N], 0..classes-1.
        alpha: above 0; small values give shares near 0 or 1.

    Returns:
        Inputs FP32 [N, ...] in the range of `inputs_NX` (uint8 tiles stay in 0..255, not rounded: normalisation comes after
        and is linear), and labels FP32 [N, classes] whose rows sum to 1.
    """
    share = float(generator.beta(alpha, alpha))
    partner_N = torch.from_numpy(generator.permutation(len(labels_N))).to(inputs_NX.device)
    plain_NX = inputs_NX.to(torch.float32)
    soft_NK = functional.one_hot(labels_N, classes).to(torch.float32)
    return torch.lerp(plain_NX[partner_N], plain_NX, share), torch.lerp(soft_NK[partner_N], soft_NK, share)


def weighted_cross_entropy(
    logits_NK: torch.Tensor,
    targets: torch.Tensor,
    *,
    class_weights_K: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy for hard and mixed labels, as a sum and the weight it is to be divided by.

    For hard labels `loss_sum / weight_sum` is torch.nn.CrossEntropyLoss(weight, label_smoothing=...); for mixed ones,
    where torch divides by N whatever the classes weigh, it is the same formula. Batches whose gradients are added up
    give one large batch's gradient if the sum of their losses is divided by the sum of their weights.

    Args:
        logits_NK: [N, K], any floating dtype; computed in FP32.
        targets: int64 [N], or FP32 [N, K] with rows that sum to 1.
        class_weights_K: FP32 [K], default 1.
        label_smoothing: 0..1.

    Returns:
        loss_sum and weight_sum, FP32 scalars; weight_sum carries no gradient.
    """
    classes = logits_NK.shape[1]
    soft_NK = targets if targets.ndim == 2 else functional.one_hot(targets, classes)
    soft_NK = soft_NK.to(torch.float32)
    smooth_NK = soft_NK * (1 - label_smoothing) + label_smoothing / classes
    log_NK = functional.log_softmax(logits_NK.to(torch.float32), dim=1)
    if class_weights_K is not None:
        smooth_NK, soft_NK = smooth_NK * class_weights_K, soft_NK * class_weights_K
    return -(smooth_NK * log_NK).sum(), soft_NK.sum()
