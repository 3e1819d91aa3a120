"""training/mil/network.py"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from training import network, optimisation
from training.errors import ArchitectureError
from training.mil.network import SlideNetwork, build_encoder, build_head, embed
from training.mil.options import BagOptions

from .conftest import SPEC


def make_network(options: BagOptions, architecture: str = "resnet18") -> SlideNetwork:
    torch.manual_seed(2)
    encoder = build_encoder(architecture, SPEC, options).module
    return SlideNetwork(encoder, build_head(encoder.feature_dim, SPEC, options))


def random_tiles(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 32, 32, 3), dtype=torch.uint8)


@pytest.mark.parametrize("training", [False, True])
def test_padding_does_not_show_even_in_batch_norm(training: bool) -> None:
    model = make_network(BagOptions(attention_dim=8)).train(training)
    tiles_BTSS3, mask_BT = random_tiles(2, 3), torch.tensor([[True] * 3, [True, True, False]])
    short = model((tiles_BTSS3, mask_BT))
    padded_BTSS3 = torch.cat([tiles_BTSS3, random_tiles(2, 4)], dim=1)
    padded_BTSS3[1, 2] = 255
    long = model((padded_BTSS3, torch.cat([mask_BT, torch.zeros(2, 4, dtype=torch.bool)], dim=1)))
    assert (short - long).abs().max() < 1e-6


def test_all_of_a_backbone_but_its_classifier() -> None:
    encoder = build_encoder("resnet18", SPEC, BagOptions()).module
    assert encoder.feature_dim == 512
    assert encoder.eval()(random_tiles(3)).shape == (3, 512)


@pytest.mark.parametrize(
    ("architecture", "layer", "tile_pooling", "embedding_dim"),
    [
        ("resnet18", "layer2", "mean", 128),
        ("resnet18", "layer3", "mean+max", 512),
        ("efficientnet_lite0", "blocks.4", "max", 40),
    ],
)
def test_an_encoder_that_ends_at_an_earlier_layer(
    architecture: str, layer: str, tile_pooling: str, embedding_dim: int
) -> None:
    options = BagOptions.model_validate({"encoder_layer": layer, "tile_pooling": tile_pooling})
    torch.manual_seed(3)
    encoder = build_encoder(architecture, SPEC, options).module.eval()
    torch.manual_seed(3)
    whole = network.build_encoder(architecture, SPEC).eval()
    seen = {}
    whole.backbone.get_submodule(layer).register_forward_hook(
        lambda _, __, map_NCHW: seen.update(map=map_NCHW)
    )
    tiles_NHWC = random_tiles(2)
    with torch.no_grad():
        whole(tiles_NHWC)
        found = encoder(tiles_NHWC)
    poolings = {"mean": seen["map"].mean(dim=(2, 3)), "max": seen["map"].amax(dim=(2, 3))}
    expected = torch.cat([poolings[name] for name in tile_pooling.split("+")], dim=1)
    assert encoder.feature_dim == embedding_dim == found.shape[1]
    assert torch.allclose(found, expected, atol=1e-6)


def test_layers_behind_the_last_one_are_not_kept_and_names_stay_for_freezing() -> None:
    model = make_network(BagOptions(encoder_layer="layer2"))
    backbone = model.encoder.backbone.backbone
    assert not any("layer3" in name for name, _ in model.named_parameters())
    frozen = optimisation.freeze(backbone, ["conv1", "bn1", "layer1"])
    learning = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert learning
    assert all(name.startswith("layer2") for name in learning)
    groups = optimisation.parameter_groups(
        model, backbone, weight_decay=0.1, backbone_learning_rate_factor=0.1
    )
    assert {group["rate_factor"] for group in groups} == {0.1, 1.0}
    optimisation.to_training_mode(model, frozen)
    before = backbone.get_submodule("bn1").running_mean.clone()
    model((random_tiles(2, 2), torch.ones(2, 2, dtype=torch.bool)))
    assert torch.equal(backbone.get_submodule("bn1").running_mean, before)


def test_an_unknown_or_useless_layer() -> None:
    with pytest.raises(ArchitectureError, match=r"'layer9' is no module of 'resnet18'; it consists of conv1"):
        build_encoder("resnet18", SPEC, BagOptions(encoder_layer="layer9"))
    with pytest.raises(ArchitectureError, match=r"cannot be cut at bags\.encoder_layer 'fc'"):
        build_encoder("resnet18", SPEC, BagOptions(encoder_layer="fc"))


@pytest.mark.parametrize("layer", ["", "layer2"])
def test_the_encoder_can_be_exported_for_any_number_of_tiles(layer: str) -> None:
    encoder = build_encoder("resnet18", SPEC, BagOptions(encoder_layer=layer)).module.eval()
    dynamic = {"tiles_NHWC": {0: torch.export.Dim("tiles", min=1, max=4096)}}
    exported = torch.export.export(encoder, (random_tiles(2),), dynamic_shapes=dynamic).module()
    traced = torch.jit.trace(encoder, (random_tiles(2),))
    tiles_NHWC = random_tiles(5)
    assert torch.allclose(exported(tiles_NHWC), encoder(tiles_NHWC), atol=1e-4)
    assert torch.allclose(traced(tiles_NHWC), encoder(tiles_NHWC), atol=1e-4)


def test_weights_of_the_whole_network_fit_an_encoder_that_is_cut(tmp_path: Path) -> None:
    torch.manual_seed(5)
    whole = network.build("resnet18", SPEC)
    torch.save(whole.backbone.state_dict(), tmp_path / "resnet.pth")
    built = build_encoder(
        "resnet18", SPEC, BagOptions(encoder_layer="layer1"), weights=str(tmp_path / "resnet.pth")
    )
    own = built.module.state_dict()
    name = "layer1.0.conv1.weight"
    assert torch.equal(own[f"backbone.backbone.{name}"], whole.backbone.state_dict()[name])
    assert built.pretrained is not None


def test_a_long_bag_is_embedded_in_parts() -> None:
    spec = dataclasses.replace(SPEC, input_size_px=32)
    encoder = build_encoder("squeezenet1_1", spec, BagOptions()).module.eval()
    tiles_NHWC = random_tiles(130)
    with torch.no_grad():
        assert torch.allclose(embed(encoder, tiles_NHWC), encoder(tiles_NHWC), atol=1e-5)
