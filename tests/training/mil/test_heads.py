"""training/mil/heads.py"""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from training.mil.heads import GatedAttention, ServedHead, SlideHead

Pooling = Literal["attention", "mean"]
POOLINGS: tuple[Pooling, ...] = ("attention", "mean")


def make_head(pooling: Pooling, hidden_dim: int = 8) -> SlideHead:
    torch.manual_seed(0)
    return SlideHead(12, 3, pooling=pooling, hidden_dim=hidden_dim, attention_dim=5, dropout=0.3).eval()


def test_attention_is_the_formula_of_the_paper() -> None:
    torch.manual_seed(1)
    attention, h = GatedAttention(4, 3), torch.randn(1, 6, 4)
    found = attention(h, torch.ones(1, 6, dtype=torch.bool))[0]
    v, u, w = attention.content, attention.gate, attention.weight
    scores = []
    for k in range(6):
        tanh = torch.tanh(v.weight @ h[0, k] + v.bias)
        gate = 1 / (1 + torch.exp(-(u.weight @ h[0, k] + u.bias)))
        scores.append((w.weight @ (tanh * gate)).item())
    expected = torch.tensor(scores).exp() / torch.tensor(scores).exp().sum()
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("filling", [0.0, 1e4])
def test_padding_does_not_show(pooling: Pooling, filling: float) -> None:
    head = make_head(pooling)
    bag_1TD = torch.randn(1, 5, 12)
    alone_1K, attention_1T = head(bag_1TD, torch.ones(1, 5, dtype=torch.bool))
    padded_BTD = torch.full((3, 9, 12), filling)
    mask_BT = torch.zeros(3, 9, dtype=torch.bool)
    padded_BTD[1, :5], mask_BT[1, :5] = bag_1TD[0], True
    padded_BTD[0], mask_BT[0] = torch.randn(9, 12), True
    padded_BTD[2, 8], mask_BT[2, 8] = torch.randn(12), True
    logits_BK, attention_BT = head(padded_BTD, mask_BT)
    assert (logits_BK[1] - alone_1K[0]).abs().max() < 1e-6
    assert (attention_BT[1, :5] - attention_1T[0]).abs().max() < 1e-6
    assert (attention_BT[~mask_BT] == 0).all()
    assert torch.allclose(attention_BT.sum(dim=1), torch.ones(3))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_do_not_depend_on_padding_and_are_finite(pooling: Pooling) -> None:
    head, bag_1TD = make_head(pooling), torch.randn(1, 3, 12)
    head(bag_1TD, torch.ones(1, 3, dtype=torch.bool))[0].sum().backward()
    alone = [parameter.grad.clone() for parameter in head.parameters() if parameter.grad is not None]
    head.zero_grad()
    padded_1TD = torch.cat([bag_1TD, torch.full((1, 4, 12), 7.0)], dim=1)
    head(padded_1TD, torch.arange(7)[None] < 3)[0].sum().backward()
    padded = [parameter.grad for parameter in head.parameters() if parameter.grad is not None]
    assert all((one - other).abs().max() < 1e-6 for one, other in zip(alone, padded, strict=True))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_order_of_tiles_does_not_show(pooling: Pooling) -> None:
    head, bag_TD = make_head(pooling, hidden_dim=0), torch.randn(6, 12)
    order = torch.randperm(6)
    probabilities_K, attention_T = ServedHead(head)(bag_TD)
    turned_K, turned_T = ServedHead(head)(bag_TD[order])
    assert torch.allclose(probabilities_K, turned_K, atol=1e-6)
    assert torch.allclose(attention_T[order], turned_T, atol=1e-6)


def test_mean_pooling_is_the_mean() -> None:
    head, bag_TD = make_head("mean"), torch.randn(4, 12)
    logits_1K, attention_1T = head(bag_TD[None], torch.ones(1, 4, dtype=torch.bool))
    assert torch.allclose(attention_1T, torch.full((1, 4), 0.25))
    assert torch.allclose(logits_1K[0], head.classifier(head.project(bag_TD).mean(dim=0)), atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_served_head_can_be_exported_for_any_number_of_tiles(pooling: Pooling) -> None:
    served, example_TD = ServedHead(make_head(pooling)), torch.randn(4, 12)
    dynamic = {"embeddings_TD": {0: torch.export.Dim("tiles", min=1, max=4096)}}
    exported = torch.export.export(served, (example_TD,), dynamic_shapes=dynamic).module()
    traced = torch.jit.trace(served, (example_TD,))
    for count in (1, 7, 300):
        bag_TD = torch.randn(count, 12)
        expected = served(bag_TD)
        for graph in (exported, traced):
            for one, other in zip(graph(bag_TD), expected, strict=True):
                assert torch.allclose(one, other, atol=1e-6)
