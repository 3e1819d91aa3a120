"""What moves the weights, and how fast: frozen modules, parameter groups, learning rates over the run.

Weight decay is for the weights of convolutions and linear layers alone. Biases, the scales and shifts of norms, class
tokens, position embeddings and layer scales are free of it: shrinking them regularises nothing (He et al. 2019, "Bag of
Tricks", 3.1), and for a norm it changes only the effective learning rate of the layer before.

A learning rate is a function of the step number. Nothing else has to be saved for a run to go on where it stopped.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from training.errors import RecipeError

EVERYTHING = "*"


def freeze(backbone: nn.Module, names: Sequence[str], *, classifier: str = "") -> tuple[nn.Module, ...]:
    """Stop gradients into modules of `backbone`.

    Args:
        classifier: name of the classifier in `backbone` (`network.classifier_name`), "" where it has none (an encoder).
        names: of modules as `backbone.named_modules()` has them, each with all that is below it ("layer1" holds
            "layer1.0.conv1"); "*" is all but the classifier.

    Returns:
        The modules for `to_training_mode`: those whose parameters are all frozen. A dropout before the classifier is
        not among them.

    Raises:
        RecipeError: a name that the backbone does not have, or nothing is left to learn though `classifier` is named.
    """
    modules = dict(backbone.named_modules())
    unknown = [name for name in names if name != EVERYTHING and (not name or name not in modules)]
    if unknown:
        known = ", ".join(name for name, _ in backbone.named_children())
        raise RecipeError(
            "freeze", [f"{name!r} is no module of the backbone; it consists of {known}" for name in unknown]
        )
    if not names:
        return ()
    for name, parameter in backbone.named_parameters():
        if (EVERYTHING in names and not _below(name, classifier)) or any(
            _below(name, frozen) for frozen in names
        ):
            parameter.requires_grad_(False)
    if classifier and not any(parameter.requires_grad for parameter in backbone.parameters()):
        raise RecipeError("freeze", [f"{', '.join(names)}: nothing is left that learns"])
    return tuple(
        module
        for module in backbone.modules()
        if any(True for _ in module.parameters())
        and not any(parameter.requires_grad for parameter in module.parameters())
    )


def to_training_mode(model: nn.Module, frozen: Sequence[nn.Module]) -> None:
    """`model.train()`, but the modules that `freeze` returned stay in evaluation mode.

    BatchNorm in training mode would go on collecting statistics whether its parameters learn or not.
    """
    model.train()
    for module in frozen:
        module.eval()


def parameter_groups(
    model: nn.Module,
    backbone: nn.Module | None,
    *,
    classifier: str = "",
    weight_decay: float,
    backbone_learning_rate_factor: float = 1.0,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """The parameters that learn, grouped by learning rate and weight decay, for torch.optim.AdamW.

    The head (all that is not in `backbone`, and the backbone's own classifier) learns with the full rate; block b of the
    backbone's L blocks with backbone_learning_rate_factor * layer_decay ** (L - b), b from 0 (Clark et al. 2020,
    ELECTRA; Bao et al. 2022, BEiT).

    Args:
        model: not wrapped by Accelerate yet, frozen modules frozen already.
        backbone: the part of `model` that is pretrained, or None.
        classifier: as for `freeze`.

    Returns:
        Groups of `params`, `weight_decay`, `rate_factor` (1 for the head) and `name` (for logs), in the order of the
        blocks. Every parameter that requires a gradient is in exactly one.
    """
    factor_of: dict[int, float] = {}
    if backbone is not None:
        layers = backbone_layers(backbone, classifier=classifier)
        for number, parameters in enumerate(layers):
            factor = backbone_learning_rate_factor * layer_decay ** (len(layers) - number)
            factor_of.update({id(parameter): factor for parameter in parameters})
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = factor_of.get(id(parameter), 1.0)
        decays = name.rpartition(".")[2].endswith("weight") and parameter.ndim >= 2
        group = groups.setdefault(
            (factor, decays),
            {
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "rate_factor": factor,
                "name": f"rate x {factor:.3g}, {'decay' if decays else 'no decay'}",
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def backbone_layers(backbone: nn.Module, *, classifier: str = "") -> list[list[nn.Parameter]]:
    """The parameters of a backbone by depth, without its classifier.

    Depth follows from the order in which modules are defined, which in torchvision is the order of use. A module whose
    class occurs several times and that is no mere sequence is a block (BasicBlock, MBConv, CNBlock, EncoderBlock) and
    one layer. What lies between blocks (stem, downsampling, last norm) is a layer as well; a second convolution or
    linear layer there begins another one.
    """
    kinds = collections.Counter(type(module) for module in backbone.modules())
    layers: list[list[nn.Parameter]] = []
    last = "block"
    for module, parameters, is_block in _parts(backbone, classifier, kinds):
        weighted = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
        if is_block or last == "block" or (weighted and last == "weighted"):
            layers.append([])
            last = "unweighted"
        layers[-1].extend(parameters)
        last = "block" if is_block else "weighted" if weighted else last
    return layers


def learning_rate_share(
    step: int, steps: int, *, schedule: str, warmup_share: float, cycles: int = 0
) -> float:
    """The learning rate of a step as a share of the highest one.

    A linear warm-up, then half a cosine to 0 (Loshchilov and Hutter 2017); with "cyclic", `cycles` of equal length that
    each end near 0, the warm-up being part of the first one (Huang et al. 2017, Snapshot Ensembles, equation 2).

    Args:
        step: from 0, counted in moves of the weights.
        steps: of the whole run; a multiple of `cycles`.
        schedule: "cosine" or "cyclic".
        warmup_share: 0..1, of `steps`.

    Returns:
        0..1.
    """
    warmup_steps = warmup_share * steps
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    parts = cycles if schedule == "cyclic" else 1
    steps_a_cycle = steps / parts
    cycle = min(int(step / steps_a_cycle), parts - 1)
    first = max(cycle * steps_a_cycle, warmup_steps)
    progress = (step - first) / max(1.0, (cycle + 1) * steps_a_cycle - first)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Give every group of `parameter_groups` its share of `learning_rate` (Accelerate's optimizer will do as well)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate_factor"]


def snapshot_epochs(schedule: str, epochs: int, cycles: int) -> tuple[int, ...]:
    """The epochs, counted from 1, at whose end a cycle ends; none without cycles."""
    return tuple(range(epochs // cycles, epochs + 1, epochs // cycles)) if schedule == "cyclic" else ()


def _below(name: str, module_name: str) -> bool:
    return bool(module_name) and (name == module_name or name.startswith(f"{module_name}."))


def _parts(
    module: nn.Module, classifier: str, kinds: Mapping[type[nn.Module], int], name: str = ""
) -> Iterator[tuple[nn.Module, list[nn.Parameter], bool]]:
    """Blocks (True) and what lies between them (False), in order, with their parameters."""
    children = list(module.named_children())
    chained = isinstance(module, (nn.Sequential, nn.ModuleList))
    if name and children and not chained and kinds[type(module)] > 1:
        yield module, list(module.parameters()), True
        return
    own = list(module.parameters(recurse=False))
    if own:
        yield module, own, False
    for child_name, child in children:
        full_name = f"{name}.{child_name}" if name else child_name
        if full_name != classifier:
            yield from _parts(child, classifier, kinds, full_name)
