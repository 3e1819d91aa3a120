"""What is particular to each format's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from torch import nn

from exporters.errors import FormatError, GraphError
from exporters.formats import formats_named
from exporters.formats.interface import Network
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
