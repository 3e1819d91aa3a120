"""The networks of multiple-instance learning: an encoder of tiles, a head for slides, and the two as one."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from slides.spec import ModelSpec
from training import network, pretrained
from training.errors import ArchitectureError
from training.mil.heads import SlideHead
from training.mil.options import BagOptions

ENCODER_BATCH = 64
"""Tiles that are encoded at a time where a bag may have any number of them."""


class LayerPool(nn.Module):
    """A backbone up to one of its layers, and the map there pooled over the tile: FP32 [N, 3, S, S] to [N, D]."""

    def __init__(self, backbone: nn.Module, layer: str, tile_pooling: str) -> None:
        super().__init__()
        self.backbone = create_feature_extractor(backbone, {layer: "map"})
        self.tile_pooling = tile_pooling

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        map_NCHW = self.backbone(images_NCHW)["map"]
        pooled = []
        if self.tile_pooling in ("mean", "mean+max"):
            pooled.append(map_NCHW.mean(dim=(2, 3)))
        if self.tile_pooling in ("max", "mean+max"):
            pooled.append(map_NCHW.amax(dim=(2, 3)))
        return torch.cat(pooled, dim=1)


class SlideNetwork(nn.Module):
    """Encoder and head, trained end to end: bags of tiles to logits.

    Attributes:
        encoder: tiles uint8 [N, S, S, 3] to embeddings FP32 [N, D].
        head: embeddings to logits and attention.
    """

    def __init__(self, encoder: network.TileEncoder, head: SlideHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            inputs: tiles uint8 [B, T, S, S, 3] and mask bool [B, T], True where there is a tile.

        Returns:
            logits FP32 [B, K].
        """
        logits_BK, _ = self.answer(*inputs)
        return logits_BK

    def answer(self, tiles_BTSS3: torch.Tensor, mask_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """logits FP32 [B, K] and attention FP32 [B, T]."""
        # Padding is not encoded: it would cost time, and enter the statistics of BatchNorm.
        encoded_ND = self.encoder(tiles_BTSS3[mask_BT])
        embeddings_BTD = encoded_ND.new_zeros(*mask_BT.shape, encoded_ND.shape[1])
        embeddings_BTD[mask_BT] = encoded_ND
        logits_BK, attention_BT = self.head(embeddings_BTD, mask_BT)
        return logits_BK.float(), attention_BT


class BagNetwork(nn.Module):
    """The head alone, trained on embeddings of a frozen encoder."""

    def __init__(self, head: SlideHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            inputs: embeddings FP32 [B, T, D] and mask bool [B, T], True where there is a tile.

        Returns:
            logits FP32 [B, K].
        """
        logits_BK, _ = self.answer(*inputs)
        return logits_BK

    def answer(
        self, embeddings_BTD: torch.Tensor, mask_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits FP32 [B, K] and attention FP32 [B, T]."""
        logits_BK, attention_BT = self.head(embeddings_BTD, mask_BT)
        return logits_BK.float(), attention_BT


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A tile encoder, and where its weights come from.

    Attributes:
        module: FP32, on the CPU.
        pretrained: for the manifest; None where the weights are noise.
    """

    module: network.TileEncoder
    pretrained: dict[str, Any] | None


def build_encoder(
    architecture: str, spec: ModelSpec, options: BagOptions, *, weights: str = "none"
) -> Encoder:
    """The tile encoder that a recipe describes, on the CPU.

    Args:
        architecture: as for `training.network.build`.
        weights: as for `training.pretrained.load`.

    Raises:
        ArchitectureError: there is no such network or layer, or it does not fit the input.
        PretrainedError: the weights cannot be had, or do not fit.
    """
    encoder = network.build_encoder(architecture, spec)
    record = pretrained.load(encoder.backbone, architecture, weights)
    if options.encoder_layer:
        _cut(encoder, architecture, spec, options)
    return Encoder(encoder, record)


def build_head(embedding_dim: int, spec: ModelSpec, options: BagOptions) -> SlideHead:
    """The slide head that a recipe describes, with weights drawn from torch's generator."""
    return SlideHead(
        embedding_dim,
        len(spec.class_names),
        pooling=options.pooling,
        hidden_dim=options.embedding_dim,
        attention_dim=options.attention_dim,
        dropout=options.dropout,
    )


def _cut(encoder: network.TileEncoder, architecture: str, spec: ModelSpec, options: BagOptions) -> None:
    """Make `encoder` end at options.encoder_layer, in place."""
    layer = options.encoder_layer
    known = dict(encoder.backbone.named_modules())
    if layer not in known:
        shown = ", ".join(name for name, _ in encoder.backbone.named_children())
        raise ArchitectureError(
            f"bags.encoder_layer {layer!r} is no module of {architecture!r}; it consists of {shown}"
        )
    try:
        cut = LayerPool(encoder.backbone, layer, options.tile_pooling)
        encoder.backbone = cut.eval()
        with torch.no_grad():
            embeddings_ND = encoder.eval()(
                torch.zeros(2, spec.input_size_px, spec.input_size_px, 3, dtype=torch.uint8)
            )
    except (
        Exception
    ) as error:  # torch.fx and torch raise errors of many kinds, all of them for this one reason
        raise ArchitectureError(
            f"{architecture!r} cannot be cut at bags.encoder_layer {layer!r}: {error}; name a layer whose output is a "
            'map [N, C, H, W], or leave it ""'
        ) from error
    encoder.feature_dim = int(embeddings_ND.shape[1])


def embed(encoder: nn.Module, tiles_NHWC: torch.Tensor, device: str | torch.device = "cpu") -> torch.Tensor:
    """Embeddings FP32 [N, D], on the CPU, of any number of decoded tiles, a few at a time."""
    with torch.inference_mode():
        return torch.cat(
            [encoder(chunk.to(device)).float().cpu() for chunk in tiles_NHWC.split(ENCODER_BATCH)]
        )
