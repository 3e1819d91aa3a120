"""Which layer of an INT8 network is broken: found in a network where we broke it."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from exporters.errors import GraphError
from exporters.layer_errors import LayerError, broken_layers, layer_errors, layers_plot

SIDE = 16
TILES = np.random.default_rng(0).integers(0, 256, (24, SIDE, SIDE, 3), dtype=np.uint8)


def small_network() -> onnx.ModelProto:
    """Normalisation, four convolutions with a residual sum, and a classifier."""
    rng = np.random.default_rng(1)
    weights = {
        f"backbone.conv{n}.weight": rng.normal(0, 0.4, (8, 3 if n == 0 else 8, 3, 3)) for n in range(4)
    }
    weights |= {
        "backbone.fc.weight": rng.normal(0, 1, (2, 8)),
        "backbone.fc.bias": np.zeros(2),
        "scale": np.array(1 / 255),
    }
    nodes = [
        helper.make_node("Transpose", ["tiles"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planes"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["relu_0"]),
    ]
    for n in range(4):
        conv = helper.make_node(
            "Conv", [f"relu_{n}", f"backbone.conv{n}.weight"], [f"conv_{n}"], pads=[1, 1, 1, 1]
        )
        nodes += [conv, helper.make_node("Relu", [f"conv_{n}"], [f"relu_{n + 1}"])]
    nodes += [
        helper.make_node("Add", ["relu_4", "relu_2"], ["sum"]),
        helper.make_node("GlobalAveragePool", ["sum"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "backbone.fc.weight", "backbone.fc.bias"], ["logits"], transB=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["n", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """FP32 and INT8 of the small network."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [TILES[:16]]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return {"tiles": self.left.pop()} if self.left else None

    path: Path = tmp_path_factory.mktemp("small")
    onnx.save(small_network(), path / "fp32.onnx")
    quantize_static(
        path / "fp32.onnx",
        path / "int8.onnx",
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "Relu", "Add", "Gemm"],
    )
    return (path / "fp32.onnx").read_bytes(), (path / "int8.onnx").read_bytes()


def with_scale_of(int8: bytes, result: str, factor: float) -> bytes:
    """The range of one result made larger or smaller."""
    model = onnx.load_from_string(int8)
    (scale,) = (tensor for tensor in model.graph.initializer if tensor.name == f"{result}_scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(factor), scale.name))
    return bytes(model.SerializeToString())


def test_a_sound_network_loses_little_at_every_layer(pair: tuple[bytes, bytes]) -> None:
    errors = layer_errors(*pair, TILES)
    named = [error.name for error in errors]
    assert [name for name in named if name.startswith("conv") or name == "fc"] == [
        "conv0",
        "conv1",
        "conv2",
        "conv3",
        "fc",
    ]
    assert named[:2] == ["floats", "relu_0"]
    assert errors[0].snr_db == math.inf
    assert all(error.snr_db > 25 for error in errors if error.operator == "Conv")
    assert [error.from_int8 for error in errors if error.name == "conv1"] == [True]
    assert errors[-1].name == "fc"  # the answer's softmax is no layer


@pytest.mark.parametrize(
    ("broken", "factor", "name"),
    [
        ("relu_1", 0.05, "conv0"),  # saturated
        ("relu_1", 40.0, "conv0"),  # coarse
        ("relu_3", 0.05, "conv2"),
        ("relu_3", 40.0, "conv2"),
        ("sum", 0.05, "sum after conv3"),
    ],
)
def test_the_broken_layer_is_named_first(
    pair: tuple[bytes, bytes], broken: str, factor: float, name: str
) -> None:
    fp32, int8 = pair
    errors = layer_errors(fp32, with_scale_of(int8, broken, factor), TILES)
    worst = broken_layers(errors)[0]
    assert worst.name == name
    assert worst.fall_db > 10


def test_ratio_is_spread_over_mean_square(pair: tuple[bytes, bytes]) -> None:
    """Against a plain computation from the two graphs' own outputs."""
    import onnxruntime

    def logits(content: bytes) -> np.ndarray:
        model = onnx.load_from_string(content)
        model.graph.output.append(
            onnx.ValueInfoProto(name="logits_DequantizeLinear_Output" if b"Quantize" in content else "logits")
        )
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return np.asarray(session.run(None, {"tiles": TILES})[1], np.float64)

    wanted, found = map(logits, pair)
    by_hand = 10 * math.log10(wanted.var(axis=0).sum() / np.square(wanted - found).mean(axis=0).sum())
    assert layer_errors(*pair, TILES)[-1].snr_db == pytest.approx(by_hand, abs=0.01)


def test_the_picture_names_the_broken_layer(pair: tuple[bytes, bytes]) -> None:
    fp32, int8 = pair
    errors = layer_errors(fp32, with_scale_of(int8, "relu_3", 0.05), TILES)
    picture = Image.open(io.BytesIO(layers_plot(errors, title="a title")))
    assert picture.format == "PNG"
    assert picture.width > 900
    assert layers_plot(errors, title="a title") == layers_plot(errors, title="a title")


def test_networks_without_a_common_layer_and_files_that_are_none(pair: tuple[bytes, bytes]) -> None:
    fp32, int8 = pair
    other = onnx.load_from_string(int8)
    for node in other.graph.node:
        node.output[:] = [f"other_{name}" for name in node.output]
        node.input[:] = [
            name if name in {t.name for t in other.graph.initializer} | {"tiles"} else f"other_{name}"
            for name in node.input
        ]
    other.graph.output[0].name = f"other_{other.graph.output[0].name}"
    with pytest.raises(GraphError, match="no layer in common"):
        layer_errors(fp32, other.SerializeToString(), TILES)
    with pytest.raises(GraphError):
        layer_errors(fp32, b"no ONNX file", TILES)
    with pytest.raises(GraphError):
        layer_errors(fp32, int8[: len(int8) // 2], TILES)


def test_no_layers_are_an_error() -> None:
    with pytest.raises(ValueError, match="no layers"):
        layers_plot([], title="x")


def test_noise_that_is_handed_on_is_nobodys() -> None:
    errors = [
        LayerError("a", "Conv", 40.0, 10.0, True),
        LayerError("b", "Conv", 10.0, 30.0, True),
        LayerError("c", "Conv", 10.0, 0.0, True),
        LayerError("d", "Conv", 12.0, -2.0, True),
    ]
    assert [error.name for error in broken_layers(errors)] == ["b"]
