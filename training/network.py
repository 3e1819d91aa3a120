"""The networks: one that is trained, and the same one as it is served.

Both take tiles as `slides.decode.decode_tile` gives them, uint8 [N, S, S, 3]: normalisation is part of the graph, so
that a tile travels as bytes until the very last step and nothing outside has to know mean and deviation.
"""

from __future__ import annotations

import difflib

import torch
import torchvision
from torch import nn

from slides.spec import ModelSpec
from training.errors import ArchitectureError

_SEVERAL_OUTPUTS = ("googlenet", "inception_v3")


class TileNetwork(nn.Module):
    """Normalisation and a backbone: tiles uint8 [N, S, S, 3] RGB to logits FP32 [N, K]."""

    mean_C11: torch.Tensor
    std_C11: torch.Tensor

    def __init__(self, backbone: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.backbone = backbone
        # In units of a byte, so that the graph normalises in one subtraction and one division.
        self.register_buffer("mean_C11", torch.tensor(spec.mean, dtype=torch.float32).reshape(3, 1, 1) * 255)
        self.register_buffer("std_C11", torch.tensor(spec.std, dtype=torch.float32).reshape(3, 1, 1) * 255)

    def forward(self, tiles_NHWC: torch.Tensor) -> torch.Tensor:
        images_NCHW = tiles_NHWC.permute(0, 3, 1, 2).to(torch.float32)
        return self.backbone((images_NCHW - self.mean_C11) / self.std_C11)


class ServedNetwork(nn.Module):
    """What is exported: tiles uint8 [N, S, S, 3] to probabilities, confidence and label.

    Returns:
        probabilities FP32 [N, K] (softmax), confidence FP32 [N, 1] (the largest of them), label_index INT64 [N, 1].
    """

    def __init__(self, network: TileNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, tiles_NHWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        probabilities_NK = torch.softmax(self.network(tiles_NHWC), dim=1)
        confidence_N1, label_index_N1 = probabilities_NK.max(dim=1, keepdim=True)
        return probabilities_NK, confidence_N1, label_index_N1


def build(architecture: str, spec: ModelSpec, *, pretrained: bool = False) -> TileNetwork:
    """A network for the input and classes of `spec`, on the CPU, with weights drawn from torch's generator.

    Args:
        architecture: name of a torchvision classification network, for example "resnet18".
        pretrained: take torchvision's ImageNet weights for all layers whose shape fits (all but the classifier).

    Raises:
        ArchitectureError: torchvision has no such classification network, it needs a larger input, or its
            ImageNet weights cannot be had.
    """
    known = [
        name for name in torchvision.models.list_models(torchvision.models) if name not in _SEVERAL_OUTPUTS
    ]
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=3, cutoff=0.0)
        raise ArchitectureError(
            f"architecture {architecture!r} is no single-output classification network of torchvision; "
            f"near it: {', '.join(near)}"
        )
    sized: dict[str, object] = {}
    if architecture.startswith("vit_"):
        sized["image_size"] = spec.input_size_px
    elif architecture.startswith("maxvit"):
        sized["input_size"] = (spec.input_size_px, spec.input_size_px)
    try:
        backbone = torchvision.models.get_model(
            architecture, weights=None, num_classes=len(spec.class_names), **sized
        )
        if pretrained:
            _load_imagenet(architecture, backbone)
        network = TileNetwork(backbone, spec)
        _prove(network, spec)
    except ArchitectureError:
        raise
    except (
        Exception
    ) as error:  # torchvision asserts, torch raises RuntimeError: both mean that the sizes do not fit
        raise ArchitectureError(
            f"architecture {architecture!r} cannot work on {spec.input_size_px} x {spec.input_size_px} px with "
            f"{len(spec.class_names)} classes: {error}; change spec.input_size_px or the architecture"
        ) from error
    return network


def _prove(network: TileNetwork, spec: ModelSpec) -> None:
    with torch.no_grad():
        logits = network.eval()(torch.zeros(2, spec.input_size_px, spec.input_size_px, 3, dtype=torch.uint8))
    if logits.shape != (2, len(spec.class_names)):
        raise ArchitectureError(f"the network answers {tuple(logits.shape)}, not one logit a tile and class")


def _load_imagenet(architecture: str, backbone: nn.Module) -> None:
    try:
        weights = torchvision.models.get_model_weights(architecture)
        state = weights["DEFAULT"].get_state_dict(progress=False)
    except (OSError, KeyError, AttributeError, RuntimeError) as error:
        raise ArchitectureError(
            f"ImageNet weights of {architecture!r} cannot be had ({error}); connect to the network once, "
            "or set pretrained = false"
        ) from error
    own = backbone.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    backbone.load_state_dict(fitting, strict=False)
