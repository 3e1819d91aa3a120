"""A repository whose network is so small that it is exported, served and measured in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters import triton_config
from perf.install import install
from perf.tiles import benchmark_tiles
from serving.embedded import triton_home

SIZE_PX = 32
TILE_PX = 64


@pytest.fixture(scope="session")
def tiles() -> list[bytes]:
    """Eight small JPEG tiles."""
    return benchmark_tiles(8, TILE_PX)


@pytest.fixture(scope="session")
def analyzer() -> Path:
    """perf_analyzer, installed if it is not there yet."""
    return install(triton_home())[0]


@pytest.fixture(scope="session")
def tiny_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tile_classifier` over a network that looks at the mean colour of a tile."""
    repository = tmp_path_factory.mktemp("tiny repository")
    tensors = triton_config.NetworkTensors(input="tiles", outputs=triton_config.OUTPUTS)
    preprocess = triton_config.preprocess_config(
        input_size_px=SIZE_PX, max_batch=4, instances=1, max_tile_bytes=1 << 20, max_tile_pixels=1 << 20
    )
    network = triton_config.network_config(
        "tile_network_onnx",
        backend="onnxruntime",
        artifact_filename="model.onnx",
        tensors=tensors,
        parameters={"intra_op_thread_count": "1"},
        input_size_px=SIZE_PX,
        classes=2,
        max_batch=4,
        instances=1,
        instance_kind="cpu",
        versions_loaded=1,
    )
    classifier = triton_config.classifier_config(
        "tile_classifier",
        network=network,
        tensors=tensors,
        network_version=1,
        preprocess_version=1,
        parameters={},
    )
    source = Path(__file__).parents[2] / "model_repository" / "tile_preprocess" / "1" / "model.py"
    files = {
        "tile_preprocess": ("model.py", source.read_bytes()),
        "tile_network_onnx": ("model.onnx", mean_colour_network()),
        "tile_classifier": ("empty", b""),
    }
    for config in (preprocess, network, classifier):
        filename, content = files[config.name]
        version = repository / config.name / "1"
        version.mkdir(parents=True)
        (version / filename).write_bytes(content)
        (version.parent / "config.pbtxt").write_text(triton_config.to_text(config))
        (version.parent / "labels.txt").write_text("CE\nLAA\n")
    return repository


def mean_colour_network() -> bytes:
    """ONNX: uint8 tiles [N, S, S, 3] -> probabilities [N, 2], confidence [N, 1], label_index [N, 1]."""
    weights = np.asarray([[0.02, -0.02], [-0.02, 0.02], [0.001, -0.001]], np.float32)
    nodes = [
        helper.make_node("Cast", ["tiles"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "sides"], ["colour"], keepdims=0),
        helper.make_node("MatMul", ["colour", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ReduceMax", ["probabilities", "classes"], ["confidence"], keepdims=1),
        helper.make_node("ArgMax", ["probabilities"], ["label_index"], axis=1, keepdims=1),
    ]
    graph = helper.make_graph(
        nodes,
        "mean_colour",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["batch", SIZE_PX, SIZE_PX, 3])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 2]),
            helper.make_tensor_value_info("confidence", TensorProto.FLOAT, ["batch", 1]),
            helper.make_tensor_value_info("label_index", TensorProto.INT64, ["batch", 1]),
        ],
        [
            numpy_helper.from_array(np.asarray([1, 2], np.int64), "sides"),
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(np.asarray([1], np.int64), "classes"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())
