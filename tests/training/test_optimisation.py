"""training/optimisation.py"""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torch import nn

from training import network, optimisation
from training.errors import RecipeError
from training.recipe import Recipe


def first_names(backbone: nn.Module) -> list[str]:
    """The module that each layer of the backbone begins with."""
    name_of = {id(parameter): name.rpartition(".")[0] for name, parameter in backbone.named_parameters()}
    classifier = network.classifier_name(backbone)
    layers = optimisation.backbone_layers(backbone, classifier=classifier)
    counted = sum(map(len, layers)) + len(list(backbone.get_submodule(classifier).parameters()))
    assert counted == len(name_of), "every parameter is in exactly one layer, or the classifier's"
    return [name_of[id(layer[0])] for layer in layers]


def on_meta(architecture: str) -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.get_model(architecture, weights=None, num_classes=2)


def test_layers_are_blocks_in_order() -> None:
    names = first_names(on_meta("resnet18"))
    assert names == ["conv1", *(f"layer{stage}.{block}.conv1" for stage in (1, 2, 3, 4) for block in (0, 1))]
    names = first_names(on_meta("efficientnet_b0"))
    assert names[:3] == ["features.0.0", "features.1.0.block.0.0", "features.2.0.block.0.0"]
    assert (len(names), names[-1]) == (18, "features.8.0"), "stem, 16 blocks, last convolution"
    names = first_names(on_meta("convnext_tiny"))
    assert len(names) == 1 + 18 + 3 + 1, "stem, blocks, downsampling, last norm"
    assert "features.2.0" in names
    names = first_names(on_meta("vit_b_16"))
    assert len(names) == 1 + 12 + 1, "patches with class token and positions, blocks, last norm"
    assert names[1] == "encoder.layers.encoder_layer_0.ln_1"


def test_layers_without_blocks_are_convolutions() -> None:
    assert len(first_names(on_meta("vgg11_bn"))) == 8 + 2


def test_groups_hold_every_parameter_once_with_its_rate(plan: Recipe) -> None:
    built = network.build("resnet18", plan.spec)
    groups = optimisation.parameter_groups(
        built,
        built.backbone,
        classifier="fc",
        weight_decay=0.1,
        backbone_learning_rate_factor=0.5,
        layer_decay=0.8,
    )
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in built.parameters())
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    parameter = dict(built.backbone.named_parameters())
    rates = {
        name: of[id(parameter[name])]["rate_factor"]
        for name in (
            "fc.weight",
            "fc.bias",
            "layer4.1.conv2.weight",
            "layer4.0.bn1.bias",
            "conv1.weight",
            "bn1.weight",
        )
    }
    assert rates == pytest.approx(
        {
            "fc.weight": 1,
            "fc.bias": 1,
            "layer4.1.conv2.weight": 0.5 * 0.8,
            "layer4.0.bn1.bias": 0.5 * 0.8**2,
            "conv1.weight": 0.5 * 0.8**9,
            "bn1.weight": 0.5 * 0.8**9,
        }
    )
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    optimisation.set_learning_rate(optimizer, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [
        0.01 * group["rate_factor"] for group in groups
    ]


@pytest.mark.parametrize("architecture", ["resnet18", "convnext_tiny", "vit_b_16", "swin_t"])
def test_only_weights_of_layers_decay(architecture: str) -> None:
    model = on_meta(architecture)
    groups = optimisation.parameter_groups(model, None, weight_decay=0.1)
    assert {group["rate_factor"] for group in groups} == {1.0}
    decaying = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    layers = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    expected = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, layers)
        for name, parameter in module.named_parameters(recurse=False)
        if name in ("weight", "in_proj_weight")
    }
    assert decaying == expected


def test_frozen_modules_do_not_move_nor_count(plan: Recipe) -> None:
    torch.manual_seed(0)
    built = network.build("resnet18", plan.spec)
    frozen = optimisation.freeze(built.backbone, ["conv1", "bn1", "layer1", "layer2.0"], classifier="fc")
    groups = optimisation.parameter_groups(built, built.backbone, classifier="fc", weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    before = {name: value.clone() for name, value in built.state_dict().items()}
    optimisation.to_training_mode(built, frozen)
    tiles_NHWC = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    built(tiles_NHWC).square().mean().backward()
    optimizer.step()
    after = built.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    stays = ("backbone.conv1.", "backbone.bn1.", "backbone.layer1.", "backbone.layer2.0.")
    for name in before:
        expected = name.startswith(stays) or name in ("mean_C11", "std_C11")
        assert (name in same) == expected, name


def test_everything_but_the_classifier_is_frozen(plan: Recipe) -> None:
    built = network.build("mobilenet_v3_small", plan.spec)
    name = network.classifier_name(built.backbone)
    frozen = optimisation.freeze(built.backbone, ["*"], classifier=name)
    learning = [parameter_name for parameter_name, p in built.named_parameters() if p.requires_grad]
    assert learning == [f"backbone.{name}.weight", f"backbone.{name}.bias"]
    optimisation.to_training_mode(built, frozen)
    modes = {module_name: module.training for module_name, module in built.backbone.named_modules()}
    assert not any(mode for module_name, mode in modes.items() if module_name.startswith("features."))
    assert modes["classifier.2"], "the dropout before the classifier goes on"
    encoder = network.build_encoder("resnet18", plan.spec)
    optimisation.freeze(encoder.backbone, ["*"])
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_names_that_cannot_be_frozen(plan: Recipe) -> None:
    built = network.build("resnet18", plan.spec)
    with pytest.raises(RecipeError, match=r"(?s)'layer9' is no module.*conv1, bn1.*'lay' is no module"):
        optimisation.freeze(built.backbone, ["layer9", "layer1", "lay"], classifier="fc")
    assert all(parameter.requires_grad for parameter in built.parameters())
    with pytest.raises(RecipeError, match="nothing is left that learns"):
        optimisation.freeze(built.backbone, ["*", "fc"], classifier="fc")


def test_rate_rises_then_falls_to_nothing() -> None:
    rates = [
        optimisation.learning_rate_share(step, 100, schedule="cosine", warmup_share=0.2)
        for step in range(101)
    ]
    assert rates.index(max(rates)) == 20
    assert rates[20] == 1.0
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert 0 < rates[0] < 0.1
    assert rates[60] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-12)


def test_cycles_are_those_of_snapshot_ensembles() -> None:
    steps, cycles = 60, 3
    rates = [
        optimisation.learning_rate_share(step, steps, schedule="cyclic", warmup_share=0.0, cycles=cycles)
        for step in range(steps)
    ]
    # Huang et al. 2017, equation 2, with t counted from 1.
    each = math.ceil(steps / cycles)
    expected = [0.5 * (math.cos(math.pi * ((t - 1) % each) / each) + 1) for t in range(1, steps + 1)]
    assert rates == pytest.approx(expected)
    warm = [
        optimisation.learning_rate_share(step, steps, schedule="cyclic", warmup_share=0.1, cycles=cycles)
        for step in range(steps)
    ]
    assert warm[6] == 1.0
    assert warm[:7] == sorted(warm[:7])
    assert warm[20:] == pytest.approx(expected[20:]), "the warm-up is part of the first cycle"


@pytest.mark.parametrize("cycles", [1, 2, 3, 7])
def test_every_cycle_ends_near_nothing_at_its_snapshot(cycles: int) -> None:
    epochs, steps_an_epoch = 2 * cycles, 13
    ends = optimisation.snapshot_epochs("cyclic", epochs, cycles)
    assert len(ends) == cycles
    assert ends[-1] == epochs
    for epoch in ends:
        last, following = (
            optimisation.learning_rate_share(
                step, epochs * steps_an_epoch, schedule="cyclic", warmup_share=0.0, cycles=cycles
            )
            for step in (epoch * steps_an_epoch - 1, epoch * steps_an_epoch)
        )
        assert last < 0.01
        assert following == 1.0 or epoch == epochs
    assert optimisation.snapshot_epochs("cosine", epochs, 0) == ()
