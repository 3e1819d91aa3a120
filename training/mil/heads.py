"""From the embeddings of a slide's tiles to the slide's answer: gated attention and mean pooling, one interface.

Attention is a distribution over the tiles of a slide, and the slide's embedding is the mean of its tiles' embeddings
under it. Mean pooling is the same with equal weights, so that the two can be exchanged and compared.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn


class GatedAttention(nn.Module):
    """Attention weights by equation 9 of Ilse, Tomczak and Welling, "Attention-based Deep Multiple Instance Learning"
    (ICML 2018): softmax over the tiles of w^T (tanh(V h) * sigmoid(U h)).
    """

    def __init__(self, embedding_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.content = nn.Linear(embedding_dim, attention_dim)
        self.gate = nn.Linear(embedding_dim, attention_dim)
        self.weight = nn.Linear(attention_dim, 1, bias=False)  # a bias would cancel in the softmax

    def forward(self, embeddings_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """FP32 [B, T], every row sums to 1; 0 where `mask_BT` is False."""
        gated_BTA = torch.tanh(self.content(embeddings_BTD)) * torch.sigmoid(self.gate(embeddings_BTD))
        scores_BT = self.weight(gated_BTA).squeeze(-1).float()
        return torch.softmax(scores_BT.masked_fill(~mask_BT, float("-inf")), dim=1)


class EqualAttention(nn.Module):
    """The same weight for every tile of a bag: mean pooling."""

    def forward(self, embeddings_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """FP32 [B, T], every row sums to 1; 0 where `mask_BT` is False."""
        tiles_BT = mask_BT.float()
        return tiles_BT / tiles_BT.sum(dim=1, keepdim=True)


class SlideHead(nn.Module):
    """Embeddings of a bag of tiles to logits and attention.

    Args:
        embedding_dim: D, of a tile's embedding as the encoder gives it.
        classes: K.
        pooling: "attention" or "mean".
        hidden_dim: a first layer (linear, ReLU) brings embeddings down to it; 0 = none.
        attention_dim: width of the gated attention's hidden layer.
        dropout: 0..1, of embeddings while learning.
    """

    def __init__(
        self,
        embedding_dim: int,
        classes: int,
        *,
        pooling: Literal["attention", "mean"],
        hidden_dim: int = 0,
        attention_dim: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        # Embeddings of different backbones and layers differ in scale by orders of magnitude.
        layers: list[nn.Module] = [nn.LayerNorm(embedding_dim)]
        if hidden_dim:
            layers += [nn.Linear(embedding_dim, hidden_dim), nn.ReLU()]
        self.project = nn.Sequential(*layers, nn.Dropout(dropout))
        pooled_dim = hidden_dim or embedding_dim
        self.attention = (
            GatedAttention(pooled_dim, attention_dim) if pooling == "attention" else EqualAttention()
        )
        self.classifier = nn.Linear(pooled_dim, classes)

    def forward(
        self, embeddings_BTD: torch.Tensor, mask_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The answer for each bag; it does not depend on what the bags are padded with, nor on how far.

        Args:
            embeddings_BTD: FP32 [B, T, D], bags filled up to the longest with any finite values.
            mask_BT: bool [B, T], True where there is a tile; at least one a bag.

        Returns:
            logits FP32 [B, K] and attention FP32 [B, T]; a row of attention sums to 1, and is 0 where there is no tile.
        """
        projected_BTE = self.project(embeddings_BTD)
        attention_BT = self.attention(projected_BTE, mask_BT)
        pooled_BE = torch.bmm(attention_BT.unsqueeze(1), projected_BTE.float()).squeeze(1)
        return self.classifier(pooled_BE), attention_BT


class ServedHead(nn.Module):
    """What is exported: the embeddings of one slide's tiles, FP32 [T, D], any T >= 1, to its answer.

    Returns:
        probabilities FP32 [K] (softmax) and attention FP32 [T] (it sums to 1).
    """

    def __init__(self, head: SlideHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, embeddings_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings_1TD = embeddings_TD.unsqueeze(0)
        mask_1T = torch.ones_like(embeddings_1TD[:, :, 0], dtype=torch.bool)
        logits_1K, attention_1T = self.head(embeddings_1TD, mask_1T)
        return torch.softmax(logits_1K, dim=1).squeeze(0), attention_1T.squeeze(0)
