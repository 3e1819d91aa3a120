"""Encoded tiles in, the network's input out: `slides.decode.decode_tile` inside Triton.

input  `tile`   BYTES [1]        a whole JPEG or PNG file
output `tiles`  UINT8 [S, S, 3]  RGB, S = parameter `input_size_px`

Parameters (config.pbtxt, written by the exporter): `input_size_px`, `max_tile_bytes`, `max_tile_pixels`.
A request with a broken tile fails alone; the other requests of the batch get their answers.
Counted are decode times, rejected tiles and what tiles look like (docs/metrics.md).
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from slides.appearance import STATISTICS, appearance
from slides.decode import MAX_TILE_BYTES, MAX_TILE_PIXELS, decode_tile
from slides.errors import TileDecodeError
from slides.model_metrics import DECODE_EDGES_S, ModelMetrics, is_probe, public_name

KNOWN_PARAMETERS = {"input_size_px", "max_tile_bytes", "max_tile_pixels"}
APPEARANCES_A_SECOND = 10


class TileMetrics:
    """What this instance counts of its tiles."""

    def __init__(self, args: dict[str, str]) -> None:
        model = {"model": public_name(args["model_name"])}
        self.metrics = ModelMetrics(pb_utils, args["model_instance_name"])
        self.decode_s = self.metrics.histogram(
            "clotline_decode_duration_seconds", "Decoding and resizing of one tile", model, DECODE_EDGES_S
        )
        self.rejected = {
            reason: self.metrics.count(
                "clotline_rejected_inputs_total", "Inputs that got an error", {**model, "reason": reason}
            )
            for reason in TileDecodeError.REASONS
        }
        self.appearance = {
            name: self.metrics.histogram(
                "clotline_tile_appearance", "How tiles look", {**model, "statistic": name}, edges
            )
            for name, edges in STATISTICS.items()
        }
        self.second_began_s, self.looked_at = 0.0, 0
        self.metrics.show()

    def add(self, tile_HWC: np.ndarray, began_s: float) -> None:
        """A tile that was decoded; of many in a second only the first ones are looked at."""
        now_s = time.perf_counter()
        self.decode_s.add(now_s - began_s)
        if now_s - self.second_began_s >= 1:
            self.second_began_s, self.looked_at = now_s, 0
        if self.looked_at < APPEARANCES_A_SECOND:
            self.looked_at += 1
            for name, value in appearance(tile_HWC).items():
                self.appearance[name].add(value)


class TritonPythonModel:
    """Decodes and resizes; holds no state but its limits and counts."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the parameters; an unknown, missing or impossible one keeps the model from loading."""
        parameters = json.loads(args["model_config"]).get("parameters", {})
        values = {key: value["string_value"] for key, value in parameters.items()}
        unknown = sorted(set(values) - KNOWN_PARAMETERS)
        if unknown or "input_size_px" not in values:
            problem = (
                f"unknown parameter {', '.join(unknown)}" if unknown else "parameter input_size_px is missing"
            )
            raise pb_utils.TritonModelException(
                f"{args['model_name']}: {problem} (known: {sorted(KNOWN_PARAMETERS)})"
            )
        try:
            self.size_px = int(values["input_size_px"])
            self.max_bytes = int(values.get("max_tile_bytes", MAX_TILE_BYTES))
            self.max_pixels = int(values.get("max_tile_pixels", MAX_TILE_PIXELS))
        except ValueError as error:
            raise pb_utils.TritonModelException(
                f"{args['model_name']}: parameters must be whole numbers: {error}"
            ) from error
        self.metrics = TileMetrics(args)

    def finalize(self) -> None:
        """Tell the rest of the counts."""
        self.metrics.metrics.close()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in order."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        encoded = pb_utils.get_input_tensor_by_name(request, "tile").as_numpy().reshape(-1)
        counted = not is_probe(request)
        tiles_HWC = []
        for index, data in enumerate(encoded):
            began_s = time.perf_counter()
            try:
                tile_HWC = decode_tile(
                    data, self.size_px, max_bytes=self.max_bytes, max_pixels=self.max_pixels
                )
            except TileDecodeError as error:
                if counted:
                    self.metrics.rejected[error.reason].add()
                message = f"tile {index} of {len(encoded)}: {error}"
                return pb_utils.InferenceResponse(
                    error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
                )
            if counted:
                self.metrics.add(tile_HWC, began_s)
            tiles_HWC.append(tile_HWC)
        tiles_NHWC = tiles_HWC[0][np.newaxis] if len(tiles_HWC) == 1 else np.stack(tiles_HWC)
        return pb_utils.InferenceResponse([pb_utils.Tensor("tiles", tiles_NHWC)])
