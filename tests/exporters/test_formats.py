"""What is particular to each format's file."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from exporters.errors import FormatError, GraphError
from exporters.formats import formats_named
from exporters.formats.interface import Network, OnnxTarget
from exporters.formats.onnx import write_graph
from training.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def onnx_bytes(network_of: Network) -> bytes:
    return formats_named(["onnx"])[0].build(network_of).files["model.onnx"]


def test_onnx_loads_in_older_runtimes_and_has_a_free_batch(onnx_bytes: bytes) -> None:
    model = onnx.load_from_string(onnx_bytes)
    assert model.ir_version <= 10
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    for tensor in (*model.graph.input, *model.graph.output):
        assert tensor.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert all(not tensor.external_data for tensor in model.graph.initializer)


def test_onnx_moves_bytes_before_it_makes_floats_of_them(onnx_bytes: bytes) -> None:
    operators = [node.op_type for node in onnx.load_from_string(onnx_bytes).graph.node]
    assert operators[:5] == ["Transpose", "Cast", "Mul", "Add", "Conv"]


def test_onnx_does_not_tell_where_it_was_built(onnx_bytes: bytes) -> None:
    for trace in (b".py", str(Path(__file__).parents[2]).encode(), b"site-packages"):
        assert trace not in onnx_bytes


@pytest.mark.parametrize("name", ["onnx", "onnx-int8", "torchscript"])
def test_a_file_that_is_none_is_an_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(GraphError, match="cannot open"):
        formats_named([name])[0].open(path)


@pytest.mark.parametrize("name", ["onnx", "torchscript"])
def test_a_network_that_cannot_be_expressed_is_an_error(name: str) -> None:
    class Untraceable(nn.Module):
        def forward(self, images: object) -> object:
            raise NotImplementedError("this layer has no export")

    with pytest.raises(GraphError, match="cannot be written as"):
        formats_named([name])[0].build(Network(Untraceable(), (0, 0, 0), (1, 1, 1), 32))


@pytest.mark.parametrize("name", ["onnx", "torchscript"])
def test_building_leaves_the_network_as_it_was(name: str, loaded: Checkpoint) -> None:
    backbone = loaded.model.backbone
    before = {key: (value.stride(), value.clone()) for key, value in backbone.state_dict().items()}
    spec = loaded.spec
    formats_named([name])[0].build(Network(backbone, spec.mean, spec.std, spec.input_size_px))
    for key, value in backbone.state_dict().items():
        assert value.stride() == before[key][0]
        assert np.array_equal(value.numpy(), before[key][1].numpy())
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_formats_are_named_once_and_exist() -> None:
    assert [fmt.name for fmt in formats_named(["torchscript", "onnx"])] == ["torchscript", "onnx"]
    with pytest.raises(FormatError, match="choose from onnx, onnx-fp16"):
        formats_named([])
    with pytest.raises(FormatError, match=r"'tflite'.*exports onnx, onnx-fp16"):
        formats_named(["onnx", "tflite"])
    with pytest.raises(FormatError, match="twice"):
        formats_named(["onnx", "onnx"])


def small_network(**changes: object) -> Network:
    """Two layers, the same at every call."""
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    tiles = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    return dataclasses.replace(
        Network(backbone.eval(), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 32, 4, tiles), **changes
    )


@pytest.fixture(scope="module")
def networks() -> list[Network]:
    """The same one twice; each is written as ONNX once."""
    return [small_network(), small_network()]


@pytest.fixture(scope="module")
def encoder() -> Network:
    return small_network(outputs=("embedding",))


@pytest.mark.parametrize(
    "name", ["onnx", "onnx-fp16", "onnx-int8", "torchscript", "openvino", "openvino-bf16", "openvino-int8"]
)
def test_the_same_network_gives_the_same_bytes(name: str, networks: list[Network]) -> None:
    if name.startswith("openvino"):
        pytest.importorskip("openvino", reason="an extra of the exporters")
    first, second = (formats_named([name])[0].build(network) for network in networks)
    assert first == second


ROOT = Path(__file__).resolve().parents[2]
IN_ANOTHER_PROCESS = """
import hashlib, runpy, sys
from exporters.formats import formats_named
small_network = runpy.run_path(sys.argv[1])["small_network"]
for name in sys.argv[2:]:
    files = formats_named([name])[0].build(small_network()).files
    print(name, *sorted(hashlib.sha256(content).hexdigest() for content in files.values()))
"""


def test_another_process_gives_the_same_bytes(networks: list[Network]) -> None:
    names = ["torchscript", "onnx-int8", "onnx"]
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, __file__, *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for line, name in zip(done.stdout.splitlines()[-len(names) :], names, strict=True):
        files = formats_named([name])[0].build(networks[0]).files
        assert line.split() == [
            name,
            *sorted(hashlib.sha256(content).hexdigest() for content in files.values()),
        ]


def test_torchscript_does_not_tell_where_it_was_built(networks: list[Network]) -> None:
    content = formats_named(["torchscript"])[0].build(networks[0]).files["model.pt"]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        text = b"".join(map(archive.read, archive.namelist()))
    assert b"site-packages" not in text
    assert str(ROOT).encode() not in text


@pytest.mark.parametrize(
    "name", ["onnx", "onnx-fp16", "onnx-int8", "torchscript", "openvino", "openvino-int8"]
)
def test_an_encoder_gives_its_embedding(name: str, encoder: Network, tmp_path: Path) -> None:
    if name.startswith("openvino"):
        pytest.importorskip("openvino", reason="an extra of the exporters")
    network = encoder
    (fmt,) = formats_named([name])
    for filename, content in fmt.build(network).files.items():
        (tmp_path / filename).write_bytes(content)
    tiles_NHWC = network.calibration_NHWC[:5]
    found = fmt.open(tmp_path / fmt.artifact_filename, network.outputs)(tiles_NHWC)
    assert isinstance(found, tuple)
    (embedding_ND,) = found
    images = torch.from_numpy((tiles_NHWC / np.float32(255)).transpose(0, 3, 1, 2).copy())
    mean = torch.tensor(network.mean).reshape(1, 3, 1, 1)
    with torch.inference_mode():
        wanted_ND = network.backbone((images - mean) / 0.2).numpy()
    assert (embedding_ND.dtype, embedding_ND.shape) == (np.float32, (5, 3))
    tolerance = {"onnx-fp16": 0.01, "onnx-int8": 0.05, "openvino-int8": 0.05}.get(name, 1e-5)
    assert np.abs(embedding_ND - wanted_ND).max() <= tolerance * np.abs(wanted_ND).max()


def test_a_graph_of_any_inputs_has_a_free_axis_and_its_weights_inside() -> None:
    import onnxruntime

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.Linear(4, 1)

        def forward(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            attention = torch.softmax(self.attention(embeddings)[:, 0], dim=0)
            return attention @ embeddings, attention

    head = Head().eval()
    written = write_graph(head, {"embeddings": torch.zeros(2, 4)}, ("slide", "attention"), free="tiles")
    session = onnxruntime.InferenceSession(written)
    for tiles in (1, 7):
        slide, attention = session.run(None, {"embeddings": np.ones((tiles, 4), np.float32)})
        assert slide.shape == (4,)
        assert attention == pytest.approx(np.full(tiles, 1 / tiles), abs=1e-6)


def test_the_file_is_what_the_container_reads() -> None:
    for target in (OnnxTarget(18, 9), OnnxTarget(20, 10)):
        artifact = formats_named(["onnx"])[0].build(small_network(onnx_target=target))
        model = onnx.load_from_string(artifact.files["model.onnx"])
        assert (model.opset_import[0].version, model.ir_version) == (target.opset, target.ir_version)
        assert artifact.notes["onnx"] == {"opset": target.opset, "ir_version": target.ir_version}
    assert OnnxTarget.within(26, 13) == OnnxTarget(18, 10)
    assert OnnxTarget.within(17, 8) == OnnxTarget(17, 8)
    with pytest.raises(GraphError, match="needs IR version"):
        formats_named(["onnx"])[0].build(small_network(onnx_target=OnnxTarget(18, 7)))
    model = onnx.load_from_string(
        formats_named(["onnx-int8"])[0]
        .build(small_network(onnx_target=OnnxTarget(18, 9)))
        .files["model.onnx"]
    )
    assert model.ir_version == 9
