"""training/mixing.py"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from training import mixing


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    tiles_NHWC = torch.randint(0, 256, (12, 4, 4, 3), dtype=torch.uint8, generator=drawn)
    return tiles_NHWC, torch.randint(0, 3, (12,), generator=drawn)


def mix(
    batch: tuple[torch.Tensor, torch.Tensor], alpha: float, *place: int
) -> tuple[torch.Tensor, torch.Tensor]:
    tiles_NHWC, labels_N = batch
    generator = mixing.generator(*place)
    return mixing.mixup(tiles_NHWC, labels_N, classes=3, alpha=alpha, generator=generator)


def test_place_of_the_batch_decides_and_nothing_else(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    first, labels = mix(batch, 0.4, 7, 1, 5, 0)
    torch.manual_seed(99)
    np.random.seed(99)
    again, labels_again = mix(batch, 0.4, 7, 1, 5, 0)
    assert torch.equal(first, again)
    assert torch.equal(labels, labels_again)
    for other in ((8, 1, 5, 0), (7, 2, 5, 0), (7, 1, 6, 0), (7, 1, 5, 1)):
        assert not torch.equal(first, mix(batch, 0.4, *other)[0])


def test_items_and_labels_are_blended_alike(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    tiles_NHWC, labels_N = batch
    before = tiles_NHWC.clone()
    mixed_NHWC, soft_NK = mix(batch, 1.0, 0, 1, 2, 0)
    generator = mixing.generator(0, 1, 2, 0)
    share, partner_N = generator.beta(1.0, 1.0), generator.permutation(12)
    expected = share * tiles_NHWC.double() + (1 - share) * tiles_NHWC[partner_N].double()
    torch.testing.assert_close(mixed_NHWC.double(), expected, rtol=0, atol=1e-4)
    hot_NK = torch.eye(3, dtype=torch.float64)[labels_N]
    torch.testing.assert_close(
        soft_NK.double(), share * hot_NK + (1 - share) * hot_NK[partner_N], rtol=0, atol=1e-6
    )
    assert (mixed_NHWC.dtype, soft_NK.dtype) == (torch.float32, torch.float32)
    assert torch.equal(tiles_NHWC, before)
    # What a window of accumulation divides by is known from the hard labels.
    torch.testing.assert_close(soft_NK.sum(0), torch.bincount(labels_N, minlength=3).float())


def test_shares_follow_beta() -> None:
    tiles = torch.tensor([[0.0], [1.0]])
    shares = []
    for step in range(2000):
        mixed, _ = mixing.mixup(
            tiles, torch.tensor([0, 1]), classes=2, alpha=0.5, generator=mixing.generator(0, 0, step, 0)
        )
        if float(mixed.min()) != 0.0:  # another partner than itself
            shares.append(float(mixed[1]))
    assert len(shares) > 800
    assert np.mean(shares) == pytest.approx(0.5, abs=0.04)
    assert np.var(shares) == pytest.approx(
        1 / (4 * (2 * 0.5 + 1)), abs=0.02
    )  # of Beta(a, a): 1 / (4 (2a + 1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_hard_labels_give_torchs_loss_and_gradient(smoothing: float, weighted: bool) -> None:
    drawn = torch.Generator().manual_seed(3)
    logits_NK = torch.randn(32, 5, generator=drawn, requires_grad=True)
    labels_N = torch.randint(0, 4, (32,), generator=drawn)  # class 4 does not occur
    weights_K = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0]) if weighted else None
    expected = nn.CrossEntropyLoss(weight=weights_K, label_smoothing=smoothing)(logits_NK, labels_N)
    (expected_gradient,) = torch.autograd.grad(expected, logits_NK)
    for targets in (labels_N, nn.functional.one_hot(labels_N, 5).float()):
        loss_sum, weight_sum = mixing.weighted_cross_entropy(
            logits_NK, targets, class_weights_K=weights_K, label_smoothing=smoothing
        )
        (gradient,) = torch.autograd.grad(loss_sum / weight_sum, logits_NK)
        torch.testing.assert_close(loss_sum / weight_sum, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)


def test_mixed_labels_are_the_blend_of_both_losses() -> None:
    drawn = torch.Generator().manual_seed(4)
    logits_NK = torch.randn(16, 3, generator=drawn)
    first_N, second_N = torch.randint(0, 3, (2, 16), generator=drawn)
    eye = torch.eye(3)
    soft_NK = 0.3 * eye[first_N] + 0.7 * eye[second_N]
    loss_sum, weight_sum = mixing.weighted_cross_entropy(logits_NK, soft_NK)
    cross_entropy = nn.CrossEntropyLoss(reduction="sum")
    expected = 0.3 * cross_entropy(logits_NK, first_N) + 0.7 * cross_entropy(logits_NK, second_N)
    torch.testing.assert_close(loss_sum, expected)
    assert float(weight_sum) == pytest.approx(16)


def test_half_precision_logits_are_summed_in_fp32() -> None:
    logits_NK = torch.tensor([[8.0, -8.0], [0.5, 0.25]], dtype=torch.bfloat16)
    loss_sum, _ = mixing.weighted_cross_entropy(logits_NK, torch.tensor([0, 1]))
    expected = nn.functional.cross_entropy(logits_NK.double(), torch.tensor([0, 1]), reduction="sum")
    assert loss_sum.dtype == torch.float32
    assert float(loss_sum) == pytest.approx(float(expected), rel=1e-6)
