"""Models of a few hundred bytes, each with one thing that is right or wrong about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

CONFIG = """
name: "{name}"
backend: "{backend}"
max_batch_size: 4
input {{ name: "x" data_type: TYPE_FP32 dims: [ 2 ] }}
output {{ name: "y" data_type: TYPE_FP32 dims: [ 2 ] }}
instance_group {{ count: 1 kind: KIND_CPU }}
"""
IDENTITY = """
import json
import triton_python_backend_utils as pb_utils
{imports}

class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("y", pb_utils.get_input_tensor_by_name(r, "x").as_numpy())])
            for r in requests
        ]
"""
ENSEMBLE = """
platform: "ensemble"
max_batch_size: 4
input {{ name: "x" data_type: TYPE_FP32 dims: [ 2 ] }}
output {{ name: "y" data_type: TYPE_FP32 dims: [ 2 ] }}
ensemble_scheduling {{ step {{
  model_name: "{part}" model_version: 1
  input_map {{ key: "x" value: "x" }} output_map {{ key: "y" value: "y" }}
}} {more} }}
"""


def tiny_onnx(
    *, ir_version: int = 10, opset: int = 18, domain: str = "", operator: str = "Add", domain_version: int = 1
) -> onnx.ModelProto:
    """y = x + x, or one operator of another domain, with a free batch."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    inputs = ["x", "x"] if operator == "Add" else ["x"]
    node = helper.make_node(operator, inputs, ["y"], domain=domain)
    opsets = [helper.make_opsetid("", opset)]
    if domain:
        opsets.append(helper.make_opsetid(domain, domain_version))
    graph = helper.make_graph([node], "tiny", [x], [y])
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = ir_version
    return model


def with_weights(location: str = "model.onnx.data") -> tuple[onnx.ModelProto, bytes]:
    """y = x + w, the weights outside; and the bytes of that file."""
    model = tiny_onnx()
    model.graph.node[0].input[1] = "w"
    weights = numpy_helper.from_array(np.ones(2, np.float32), "w")
    content = weights.raw_data
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(len(content)))):
        weights.external_data.add(key=key, value=value)
    model.graph.initializer.append(weights)
    return model, content


class Repository:
    """A model repository that is filled model by model."""

    CONFIG = CONFIG
    tiny_onnx = staticmethod(tiny_onnx)
    with_weights = staticmethod(with_weights)

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()

    def add(
        self, name: str, files: dict[str, bytes | str], config: str | None = CONFIG, **words: Any
    ) -> Path:
        """A model with files in version 1; `config` is filled with its name and the words. Returns its directory."""
        directory = self.root / name
        (directory / "1").mkdir(parents=True)
        for filename, content in files.items():
            path = directory / "1" / filename
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        if config is not None:
            words.setdefault("backend", "onnxruntime")
            (directory / "config.pbtxt").write_text(config.format(name=name, **words))
        return directory

    def onnx(self, name: str, config: str = CONFIG, /, **wanted: Any) -> Path:
        """A model of `tiny_onnx`."""
        return self.add(name, {"model.onnx": tiny_onnx(**wanted).SerializeToString()}, config)

    def python(self, name: str, imports: Sequence[str] = ()) -> Path:
        """A Python model that hands its input on."""
        source = IDENTITY.format(imports="\n".join(f"import {module}" for module in imports))
        return self.add(name, {"model.py": source}, backend="python")

    def ensemble(self, name: str, part: str, more: str = "") -> Path:
        """An ensemble of one step."""
        return self.add(name, {}, ENSEMBLE, part=part, more=more)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """An empty one."""
    return Repository(tmp_path / "models")
