"""Bad input is an error in one line with exit code 2, and leaves nothing behind.

A full disk and two exports at once are in `test_main.py`, `test_release.py` and `test_release_place.py`; an unreachable
registry and a missing alias in `test_registry.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from exporters.__main__ import main
from exporters.errors import GraphError
from exporters.formats import formats_named
from exporters.formats.interface import Network, OnnxTarget

Refused = Callable[..., str]


@pytest.fixture
def copied(checkpoint_dir: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(checkpoint_dir, tmp_path / "spoiled"))


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Exports, which has to fail with exit code 2 and one line, and gives that line."""

    def run(checkpoint: Path, *more: str, formats: str = "torchscript") -> str:
        release = tmp_path / "release"
        words = [
            "export",
            str(checkpoint),
            "--release",
            str(release),
            "--formats",
            formats,
            "--without-server",
        ]
        assert main([*words, *more]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert captured.err.splitlines()[-1] == errors[0]
        assert not release.exists()
        assert not list(tmp_path.glob(".release*"))
        return errors[0]

    return run


def weights(checkpoint: Path) -> Path:
    (path,) = checkpoint.glob("*.safetensors")
    return path


def alter(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_truncated_weight_file(copied: Path, refused: Refused) -> None:
    whole = weights(copied).read_bytes()
    weights(copied).write_bytes(whole[: len(whole) // 2])
    assert weights(copied).name in refused(copied)


def test_one_flipped_byte_in_the_weights(copied: Path, refused: Refused) -> None:
    content = bytearray(weights(copied).read_bytes())
    content[len(content) // 2] ^= 1
    weights(copied).write_bytes(content)
    assert weights(copied).name in refused(copied)


def test_a_truncated_manifest(copied: Path, refused: Refused) -> None:
    manifest = copied / "checkpoint.json"
    manifest.write_text(manifest.read_text()[:200])
    assert "checkpoint.json" in refused(copied)


def test_the_weights_of_another_architecture(copied: Path, refused: Refused) -> None:
    alter(copied, architecture="resnet18")
    said = refused(copied)
    assert "resnet18" in said


def test_an_architecture_that_does_not_exist(copied: Path, refused: Refused) -> None:
    alter(copied, architecture="no_such_network")
    assert "no_such_network" in refused(copied)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no JPEG or PNG"),
        ({"a.jpg": "a golden tile"}, "calibration needs at least 16"),
        ({"train.csv": "image_id,center_id,patient_id,image_num,label\n", "train/a.jpg": ""}, "train.csv"),
    ],
    ids=["empty", "too_few", "no_rows"],
)
def test_a_calibration_set_that_is_empty(
    files: dict[str, str], message: str, checkpoint_dir: Path, tmp_path: Path, refused: Refused
) -> None:
    source = tmp_path / "calibration"
    source.mkdir()
    for name, content in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        if content == "a golden tile":
            shutil.copy(next((checkpoint_dir / "golden_tiles").iterdir()), source / name)
        else:
            (source / name).write_text(content)
    said = refused(checkpoint_dir, "--calibration-tiles", str(source), formats="onnx,onnx-int8")
    assert message in said
    assert str(source) in said


def test_tiles_that_are_no_tiles(checkpoint_dir: Path, tmp_path: Path, refused: Refused) -> None:
    source = tmp_path / "tiles"
    source.mkdir()
    (source / "a.jpg").write_text("no tile")
    assert "a.jpg is no tile" in refused(checkpoint_dir, "--tiles", str(source))


class Bessel(nn.Module):
    """An operator that no opset has."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(images).mean((2, 3))[:, :2]


class Sampled(nn.Module):
    """An operator that came with opset 16."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        places = images[:, :2].permute(0, 2, 3, 1)
        return nn.functional.grid_sample(images, places, align_corners=False).mean((2, 3))[:, :2]


def network(backbone: nn.Module, opset: int) -> Network:
    target = OnnxTarget(opset=opset)
    return Network(backbone, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 32, onnx_target=target)


def test_an_operator_that_no_opset_has() -> None:
    (onnx,) = formats_named(["onnx"])
    with pytest.raises(GraphError, match=r"cannot be written as ONNX \(opset 18\).*bessel_j0") as caught:
        onnx.build(network(Bessel(), 18))
    assert "\n" not in str(caught.value)
    (torchscript,) = formats_named(["torchscript"])
    torchscript.build(network(Bessel(), 18))  # what the message suggests


def test_an_operator_that_the_opset_of_an_old_container_lacks() -> None:
    (onnx,) = formats_named(["onnx"])
    onnx.build(network(Sampled(), 18))
    with pytest.raises(GraphError, match="opset 15") as caught:
        onnx.build(network(Sampled(), 15))
    assert "\n" not in str(caught.value)
