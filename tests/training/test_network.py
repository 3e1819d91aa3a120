"""training/network.py"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torchvision.transforms.functional import normalize

from slides.spec import ModelSpec
from training import network
from training.errors import ArchitectureError
from training.recipe import Recipe


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return ModelSpec(
        class_names=("a", "b", "c"),
        tile_size_px=64,
        um_per_px=1.0,
        input_size_px=64,
        tiles_per_slide=4,
        min_tissue_share=0.5,
        mean=(0.4, 0.5, 0.6),
        std=(0.1, 0.2, 0.3),
    )


@pytest.fixture(scope="module")
def tiles_NHWC() -> torch.Tensor:
    return torch.randint(
        0, 256, (5, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_normalisation_is_the_specs(spec: ModelSpec, tiles_NHWC: torch.Tensor) -> None:
    seen = network.TileNetwork(nn.Identity(), spec)(tiles_NHWC)
    expected = normalize(tiles_NHWC.permute(0, 3, 1, 2) / 255, list(spec.mean), list(spec.std))
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


def test_served_network_ends_in_probabilities(spec: ModelSpec, tiles_NHWC: torch.Tensor) -> None:
    plain = network.build("resnet18", spec).eval()
    with torch.inference_mode():
        probabilities, confidence, label_index = network.ServedNetwork(plain)(tiles_NHWC)
        expected = plain(tiles_NHWC).softmax(dim=1)
    assert (probabilities.shape, confidence.shape, label_index.shape) == ((5, 3), (5, 1), (5, 1))
    assert (probabilities.dtype, confidence.dtype) == (torch.float32, torch.float32)
    assert label_index.dtype == torch.int64
    assert torch.equal(probabilities, expected)
    assert torch.equal(probabilities.gather(1, label_index), confidence)
    assert torch.equal(label_index[:, 0], expected.argmax(dim=1))


def test_seed_decides_the_weights(plan: Recipe) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return network.build("resnet18", plan.spec).state_dict()["backbone.conv1.weight"]

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("architecture", ["mobilenet_v3_small", "vit_b_16"])
def test_other_architectures_take_the_specs_size(architecture: str, spec: ModelSpec) -> None:
    built = network.build(architecture, dataclasses.replace(spec, input_size_px=48))
    with torch.inference_mode():
        assert built(torch.zeros(3, 48, 48, 3, dtype=torch.uint8)).shape == (3, 3)


@pytest.mark.parametrize("architecture", ["resnet19", "inception_v3", "fcn_resnet50", ""])
def test_unknown_architecture_names_near_ones(architecture: str, spec: ModelSpec) -> None:
    with pytest.raises(ArchitectureError, match=rf"'{architecture}' is no .*near it: \w+, \w+"):
        network.build(architecture, spec)


def test_input_too_small_for_the_architecture(spec: ModelSpec) -> None:
    with pytest.raises(
        ArchitectureError, match=r"'alexnet' cannot work on 16 x 16 px.*change spec.input_size_px"
    ):
        network.build("alexnet", dataclasses.replace(spec, input_size_px=16))
