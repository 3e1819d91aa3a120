"""training/network.py"""

from __future__ import annotations

import copy
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


@pytest.mark.parametrize("architecture", ["mobilenet_v3_small", "vit_b_16", "efficientnet_lite0"])
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


def test_encoder_is_the_network_without_its_classifier(spec: ModelSpec, tiles_NHWC: torch.Tensor) -> None:
    torch.manual_seed(2)
    whole = network.build("mobilenet_v3_small", spec).eval()
    torch.manual_seed(2)
    encoder = network.build_encoder("mobilenet_v3_small", spec).eval()
    name = network.classifier_name(whole.backbone)
    assert name == "classifier.3"
    kept = {
        key: value for key, value in whole.state_dict().items() if not key.startswith(f"backbone.{name}.")
    }
    assert kept.keys() == encoder.state_dict().keys()
    assert all(torch.equal(value, kept[key]) for key, value in encoder.state_dict().items())
    with torch.inference_mode():
        features_ND = encoder(tiles_NHWC)
        assert torch.equal(whole.backbone.get_submodule(name)(features_ND), whole(tiles_NHWC))
    assert (features_ND.shape, features_ND.dtype) == ((5, encoder.feature_dim), torch.float32)
    assert encoder.feature_dim == 1024


@pytest.mark.parametrize(
    ("architecture", "feature_dim"),
    [("resnet18", 512), ("squeezenet1_1", 512), ("convnext_tiny", 768), ("efficientnet_lite0", 1280)],
)
def test_encoders_of_other_architectures(architecture: str, feature_dim: int, spec: ModelSpec) -> None:
    encoder = network.build_encoder(architecture, spec)
    assert encoder.feature_dim == feature_dim
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        features_ND = encoder(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))
    assert (features_ND.shape, features_ND.dtype) == ((2, feature_dim), torch.float32)


def test_encoder_errors_are_those_of_the_network(spec: ModelSpec) -> None:
    with pytest.raises(ArchitectureError, match=r"'efficientnet_lite' is no .*efficientnet_lite0"):
        network.build_encoder("efficientnet_lite", spec)
    with pytest.raises(ArchitectureError, match="cannot work on 16 x 16 px"):
        network.build_encoder("alexnet", dataclasses.replace(spec, input_size_px=16))


def test_backbone_without_classifier_has_no_classifiers_name(spec: ModelSpec) -> None:
    with pytest.raises(ArchitectureError, match="BatchNorm2d, and no classifier"):
        network.classifier_name(network.build_encoder("resnet18", spec).backbone)


def test_blended_tiles_are_answered_as_bytes_are(spec: ModelSpec, tiles_NHWC: torch.Tensor) -> None:
    built = network.build("resnet18", spec).eval()
    with torch.inference_mode():
        assert torch.equal(built(tiles_NHWC), built(tiles_NHWC.to(torch.float32)))


def test_channels_last_changes_the_layout_alone(spec: ModelSpec, tiles_NHWC: torch.Tensor) -> None:
    built = network.build("resnet18", spec).eval()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    with torch.inference_mode():
        expected = built(tiles_NHWC)
        network.to_channels_last(built)
        torch.testing.assert_close(built(tiles_NHWC), expected, rtol=1e-4, atol=1e-4)
    weight = built.get_parameter("backbone.layer1.0.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())


def test_sync_batch_norm_where_it_exists(spec: ModelSpec) -> None:
    built = network.build("resnet18", spec)
    same, line = network.sync_batch_norm(built, device_type="cpu", processes=2)
    assert same is built
    assert "needs several processes on CUDA devices, this is 2 on 'cpu'; 20 BatchNorm layers keep" in line
    same, line = network.sync_batch_norm(built, device_type="cuda", processes=1)
    assert "this is 1 on 'cuda'" in line
    names = list(built.state_dict())
    converted, line = network.sync_batch_norm(built, device_type="cuda", processes=4)
    kinds = [type(module) for module in converted.modules()]
    assert (kinds.count(nn.SyncBatchNorm), kinds.count(nn.BatchNorm2d)) == (20, 0)
    assert list(converted.state_dict()) == names
    assert line == "sync_batch_norm: 20 BatchNorm layers share statistics over 4 processes"
    plain = nn.Linear(2, 2)
    assert network.sync_batch_norm(plain, device_type="cuda", processes=4) == (
        plain,
        "sync_batch_norm: the network has no BatchNorm; nothing changed",
    )


def test_compiled_network_trains_and_keeps_its_names(
    spec: ModelSpec, tiles_NHWC: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The graphs are captured as always, but run as they are: compiling C++ would take half a minute.
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: real(module, backend="aot_eager"))
    torch.manual_seed(4)
    backbone = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16 * 16, 3)
    )
    plain = network.TileNetwork(backbone, spec)
    compiled = copy.deepcopy(plain)
    network.compile_in_place(compiled)
    states = []
    for model in (plain, compiled):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tiles_NHWC), torch.tensor([0, 1, 2, 0, 1])).backward()
            optimizer.step()
        states.append(model.state_dict())
    assert type(compiled) is network.TileNetwork
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4)
