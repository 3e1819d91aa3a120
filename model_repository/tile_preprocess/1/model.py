"""Encoded tiles in, the network's input out: `slides.decode.decode_tile` inside Triton.

input  `tile`   BYTES [1]        a whole JPEG or PNG file
output `tiles`  UINT8 [S, S, 3]  RGB, S = parameter `input_size_px`

Parameters (config.pbtxt, written by the exporter): `input_size_px`, `max_tile_bytes`, `max_tile_pixels`.
A request with a broken tile fails alone; the other requests of the batch get their answers.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from slides.decode import MAX_TILE_BYTES, MAX_TILE_PIXELS, decode_tile
from slides.errors import TileDecodeError

KNOWN_PARAMETERS = {"input_size_px", "max_tile_bytes", "max_tile_pixels"}


class TritonPythonModel:
    """Decodes and resizes; holds no state but its limits."""

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

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in order."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        encoded = pb_utils.get_input_tensor_by_name(request, "tile").as_numpy().reshape(-1)
        tiles_HWC = []
        for index, data in enumerate(encoded):
            try:
                tiles_HWC.append(
                    decode_tile(data, self.size_px, max_bytes=self.max_bytes, max_pixels=self.max_pixels)
                )
            except TileDecodeError as error:
                message = f"tile {index} of {len(encoded)}: {error}"
                return pb_utils.InferenceResponse(
                    error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
                )
        tiles_NHWC = tiles_HWC[0][np.newaxis] if len(tiles_HWC) == 1 else np.stack(tiles_HWC)
        return pb_utils.InferenceResponse([pb_utils.Tensor("tiles", tiles_NHWC)])
