"""A public model that loads in a second: ensemble `tile_classifier` over a Python model of a few lines, two instances."""

from __future__ import annotations

import http.client
import json
import struct
from pathlib import Path
from typing import Any

from slides.spec import ModelSpec

SPEC = ModelSpec(class_names=("CE", "LAA"), tile_size_px=64, um_per_px=0.5, input_size_px=32,
                 tiles_per_slide=4, min_tissue_share=0.5)  # fmt: skip
NETWORK = """
backend: "python"
max_batch_size: 4
input { name: "tile" data_type: TYPE_STRING dims: [ 1 ] }
output { name: "probabilities" data_type: TYPE_FP32 dims: [ 2 ] }
instance_group { count: 2 kind: KIND_CPU }
"""
ENSEMBLE = """
platform: "ensemble"
max_batch_size: 4
input { name: "tile" data_type: TYPE_STRING dims: [ 1 ] }
output { name: "probabilities" data_type: TYPE_FP32 dims: [ 2 ] }
ensemble_scheduling { step {
  model_name: "steady" model_version: 1
  input_map { key: "tile" value: "tile" } output_map { key: "probabilities" value: "probabilities" } } }
parameters { key: "clotline_spec" value { string_value: %s } }
"""
MODEL = """
from pathlib import Path
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.garbled = Path(args["model_repository"], "garbled")

    def execute(self, requests):
        answers = []
        for request in requests:
            tiles = pb_utils.get_input_tensor_by_name(request, "tile").as_numpy().reshape(-1)
            share = [0.9 if self.garbled.exists() else (len(tile) % 32) / 64 for tile in tiles]
            out = np.array([[s, 1 - s] for s in share], np.float32)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("probabilities", out)]))
        return answers
"""


def make_public(repository: Path) -> Path:
    """Write both models; a file `garbled` in the directory `steady` makes it answer wrongly."""
    (repository / "steady" / "1").mkdir(parents=True)
    (repository / "steady" / "1" / "model.py").write_text(MODEL)
    (repository / "steady" / "config.pbtxt").write_text(NETWORK)
    (repository / "tile_classifier" / "1").mkdir(parents=True)
    text = ENSEMBLE % json.dumps(SPEC.to_json())
    (repository / "tile_classifier" / "config.pbtxt").write_text(text)
    return repository


def ask(http_url: str, tile: bytes) -> list[float]:
    """The answer to one tile; raises OSError, HTTPException or ValueError if there is none."""
    data = struct.pack("<I", len(tile)) + tile
    tensor = {
        "name": "tile",
        "shape": [1, 1],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(data)},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    connection = http.client.HTTPConnection(http_url, timeout=10)
    try:
        headers = {"Inference-Header-Content-Length": str(len(head))}
        connection.request("POST", "/v2/models/tile_classifier/infer", head + data, headers)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise ValueError(body.decode())
        return list(json.loads(body)["outputs"][0]["data"])
    finally:
        connection.close()


def expected(tile: bytes) -> list[float]:
    """What `ask` must return."""
    share = (len(tile) % 32) / 64
    return [share, 1 - share]


def health(url: str, path: str = "/ready") -> tuple[int, dict[str, Any]]:
    """Status and body of GET /ready or /live."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, dict(json.loads(answer.read()))
    finally:
        connection.close()
