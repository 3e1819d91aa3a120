"""AOTInductor: a network is compiled, opened again, and answers as PyTorch does at every batch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from exporters.errors import DamagedArtifactError, GraphError, ParityError, UnavailableError
from exporters.formats import formats_named
from exporters.formats.interface import Answer, Network
from exporters.parity import check_parity
from exporters.triton_config import OUTPUTS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch-aoti compiles C++")
SIZE_PX = 16
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


class Small(nn.Module):
    """Compiles in seconds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 4, 3, stride=4)
        self.linear = nn.Linear(4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.relu(self.convolution(images)).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(Small().eval(), MEAN, STD, SIZE_PX, max_batch=4)


@pytest.fixture(scope="module")
def tiles_NHWC() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def artifact(network: Network) -> Any:
    (fmt,) = formats_named(["torch-aoti"])
    fmt.require()
    return fmt.build(network)


@pytest.fixture(scope="module")
def package(artifact: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aoti") / "model.pt2"
    path.write_bytes(artifact.files["model.pt2"])
    return path


def expected(network: Network, tiles_NHWC: np.ndarray) -> Answer:
    mean, std = (np.asarray(values, np.float32) for values in (MEAN, STD))
    images = torch.from_numpy(((tiles_NHWC / np.float32(255) - mean) / std).transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        probabilities = torch.softmax(network.backbone(images), dim=1)
    confidence, label_index = probabilities.max(dim=1, keepdim=True)
    return Answer(probabilities.numpy(), confidence.numpy(), label_index.numpy())


def test_it_answers_as_pytorch_does_at_every_batch(
    network: Network, package: Path, tiles_NHWC: np.ndarray
) -> None:
    (fmt,) = formats_named(["torch-aoti"])
    wanted = expected(network, tiles_NHWC)
    measured = check_parity("torch-aoti", fmt.open(package), tiles_NHWC, wanted, max_batch=4)
    assert measured.batches == (1, 2, 4)
    assert measured.max_abs_diff <= 1e-5
    swapped = Answer(wanted.probabilities[:, ::-1].copy(), wanted.confidence, 2 - wanted.label_index)
    with pytest.raises(ParityError):
        check_parity("torch-aoti", fmt.open(package), tiles_NHWC, swapped, max_batch=4)


def test_it_says_what_it_was_compiled_with_and_where_it_is_unproven(artifact: Any) -> None:
    (fmt,) = formats_named(["torch-aoti"])
    assert artifact.notes["torch"] == torch.__version__
    assert "build it there" in (fmt.unproven_here() or "")
    assert (fmt.backend, fmt.platform) == ("pytorch", "torch_aoti")
    assert (fmt.tensors.input, fmt.tensors.outputs) == ("ARGS[0]", ("RESULT[0]", "RESULT[1]", "RESULT[2]"))
    assert fmt.tensors_of(("embedding",)).outputs == ("RESULT[0]",)
    assert fmt.tensors_of(OUTPUTS) == fmt.tensors


def test_a_damaged_package_is_named(package: Path, tmp_path: Path) -> None:
    (fmt,) = formats_named(["torch-aoti"])
    content = bytearray(package.read_bytes())
    (tmp_path / "short.pt2").write_bytes(content[: len(content) // 2])
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.pt2").write_bytes(content)
    for name in ("short", "flipped"):
        with pytest.raises(DamagedArtifactError, match=name):
            fmt.open(tmp_path / f"{name}.pt2")


def test_a_network_that_cannot_be_compiled_is_an_error() -> None:
    class Untraceable(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("this layer has no export")

    with pytest.raises(GraphError, match="AOTInductor"):
        formats_named(["torch-aoti"])[0].build(Network(Untraceable(), MEAN, STD, SIZE_PX))


def test_without_a_compiler_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnavailableError, match=r"no-such-compiler was not found: apt-get install"):
        formats_named(["torch-aoti"])[0].require()
