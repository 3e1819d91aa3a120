"""The networks: one that is trained, the same one as it is served, and its encoder alone.

All take tiles as `slides.decode.decode_tile` gives them, uint8 [N, S, S, 3]: normalisation is part of the graph, so
that a tile travels as bytes until the very last step and nothing outside has to know mean and deviation.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from typing import Any

import torch
import torchvision
from torch import nn

from slides.spec import ModelSpec
from training import efficientnet_lite
from training.errors import ArchitectureError

EFFICIENTNET_LITE0 = "efficientnet_lite0"
_SEVERAL_OUTPUTS = ("googlenet", "inception_v3")


class TileNetwork(nn.Module):
    """Normalisation and a backbone: tiles uint8 [N, S, S, 3] RGB to logits FP32 [N, K]."""

    mean_C11: torch.Tensor
    std_C11: torch.Tensor

    def __init__(self, backbone: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.backbone = backbone
        _register_normalisation(self, spec)

    def forward(self, tiles_NHWC: torch.Tensor) -> torch.Tensor:
        return self.backbone(_normalised(self, tiles_NHWC))


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


class TileEncoder(nn.Module):
    """Normalisation and a backbone without its classifier: tiles uint8 [N, S, S, 3] RGB to features FP32 [N, D].

    Its state dict is that of `TileNetwork` without the classifier's entries.

    Attributes:
        feature_dim: D.
    """

    mean_C11: torch.Tensor
    std_C11: torch.Tensor

    def __init__(self, backbone: nn.Module, spec: ModelSpec, feature_dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_dim = feature_dim
        _register_normalisation(self, spec)

    def forward(self, tiles_NHWC: torch.Tensor) -> torch.Tensor:
        # Under autocast the last layer answers in half precision; pooling and head work in FP32.
        return self.backbone(_normalised(self, tiles_NHWC)).to(torch.float32)


def build(architecture: str, spec: ModelSpec) -> TileNetwork:
    """A network for the input and classes of `spec`, on the CPU, with weights drawn from torch's generator.

    Args:
        architecture: name of a torchvision classification network, for example "resnet18", or "efficientnet_lite0".
            Weights other than noise: `training.pretrained.load`.

    Raises:
        ArchitectureError: there is no such classification network, or it needs a larger input.
    """
    with _fitting(architecture, spec):
        network = TileNetwork(_backbone(architecture, spec), spec)
        _prove(network, spec, len(spec.class_names))
    return network


def build_encoder(architecture: str, spec: ModelSpec) -> TileEncoder:
    """The network of `build` without its classifier: with the same generator, the same weights.

    Raises:
        ArchitectureError: as `build`.
    """
    with _fitting(architecture, spec):
        backbone = _backbone(architecture, spec)
        name = classifier_name(backbone)
        classifier: Any = backbone.get_submodule(name)
        feature_dim = classifier.in_features if isinstance(classifier, nn.Linear) else classifier.in_channels
        backbone.set_submodule(name, nn.Identity())
        encoder = TileEncoder(backbone, spec, int(feature_dim))
        _prove(encoder, spec, encoder.feature_dim)
    return encoder


def classifier_name(backbone: nn.Module) -> str:
    """Name of the layer that gives the logits, for example "fc", "classifier.1" or "heads.head".

    It is the last module with weights of its own: torchvision's networks define their layers in the order of use.

    Raises:
        ArchitectureError: that module is neither linear nor a convolution.
    """
    name, last = "", backbone
    for name_of_next, module in backbone.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            name, last = name_of_next, module
    if not isinstance(last, (nn.Linear, nn.Conv2d)):
        raise ArchitectureError(
            f"the last layer of {type(backbone).__name__} is {name!r}, a {type(last).__name__}, and no classifier"
        )
    return name


def to_channels_last(model: nn.Module) -> None:
    """Keep the weights of convolutions as [out, H, W, in] in memory, in place; shapes and names stay.

    Tiles arrive as [N, H, W, 3], and the permuted view that the backbone sees is channels-last already.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def compile_in_place(model: nn.Module) -> None:
    """torch.compile without a wrapper: the names of the state dict stay clean. Call it before Accelerate's prepare."""
    model.compile()


def sync_batch_norm(model: nn.Module, *, device_type: str, processes: int) -> tuple[nn.Module, str]:
    """BatchNorm over the batches of all processes, where that exists: several processes, on GPUs.

    Args:
        model: on the CPU or its device, not wrapped yet.
        device_type: "cuda", "cpu", ... of the device that trains.
        processes: training processes of all machines.

    Returns:
        The model (its BatchNorm layers replaced, names and weights kept), and a line for the log.
    """
    layers = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if layers == 0:
        return model, "sync_batch_norm: the network has no BatchNorm; nothing changed"
    if processes < 2 or device_type != "cuda":
        return model, (
            f"sync_batch_norm: needs several processes on CUDA devices, this is {processes} on {device_type!r}; "
            f"{layers} BatchNorm layers keep the statistics of their own process"
        )
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return (
        converted,
        f"sync_batch_norm: {layers} BatchNorm layers share statistics over {processes} processes",
    )


def _register_normalisation(module: nn.Module, spec: ModelSpec) -> None:
    # In units of a byte, so that the graph normalises in one subtraction and one division.
    module.register_buffer("mean_C11", torch.tensor(spec.mean, dtype=torch.float32).reshape(3, 1, 1) * 255)
    module.register_buffer("std_C11", torch.tensor(spec.std, dtype=torch.float32).reshape(3, 1, 1) * 255)


def _normalised(module: TileNetwork | TileEncoder, tiles_NHWC: torch.Tensor) -> torch.Tensor:
    """FP32 [N, 3, S, S]; uint8 tiles, or FP32 ones in 0..255 where mixup has blended them."""
    images_NCHW = tiles_NHWC.permute(0, 3, 1, 2).to(torch.float32)
    return (images_NCHW - module.mean_C11) / module.std_C11


def _backbone(architecture: str, spec: ModelSpec) -> nn.Module:
    classes = len(spec.class_names)
    if architecture == EFFICIENTNET_LITE0:
        return efficientnet_lite.EfficientNetLite0(classes, spec.input_size_px)
    known = [
        name for name in torchvision.models.list_models(torchvision.models) if name not in _SEVERAL_OUTPUTS
    ]
    if architecture not in known:
        near = difflib.get_close_matches(architecture, [*known, EFFICIENTNET_LITE0], n=3, cutoff=0.0)
        raise ArchitectureError(
            f"architecture {architecture!r} is no single-output classification network of torchvision; "
            f"near it: {', '.join(near)}"
        )
    sized: dict[str, object] = {}
    if architecture.startswith("vit_"):
        sized["image_size"] = spec.input_size_px
    elif architecture.startswith("maxvit"):
        sized["input_size"] = (spec.input_size_px, spec.input_size_px)
    return torchvision.models.get_model(architecture, weights=None, num_classes=classes, **sized)


@contextlib.contextmanager
def _fitting(architecture: str, spec: ModelSpec) -> Iterator[None]:
    try:
        yield
    except ArchitectureError:
        raise
    except Exception as error:  # torchvision asserts, torch raises RuntimeError: the sizes do not fit
        raise ArchitectureError(
            f"architecture {architecture!r} cannot work on {spec.input_size_px} x {spec.input_size_px} px with "
            f"{len(spec.class_names)} classes: {error}; change spec.input_size_px or the architecture"
        ) from error


def _prove(network: TileNetwork | TileEncoder, spec: ModelSpec, width: int) -> None:
    with torch.no_grad():
        answer = network.eval()(torch.zeros(2, spec.input_size_px, spec.input_size_px, 3, dtype=torch.uint8))
    if answer.shape != (2, width):
        raise ArchitectureError(f"the network answers {tuple(answer.shape)}, not {(2, width)}")
