"""A synthetic question for every public model, and what its answer must be.

A model is public if its configuration carries `clotline_spec`. A model with the input `tile` is asked with one tile,
one with the input `tiles` with a bag of two. The answer must be probabilities; a bag's attention must sum to 1 too.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import numpy as np

from serving.errors import ProofError
from serving.triton_http import Refused, TritonHttp
from slides.decode import encode_tile
from slides.spec import ModelSpec

SPEC_PARAMETER = "clotline_spec"
STAGED = re.compile(r".*__r\d+")  # a release that is loaded and not public (serving/releases)
BAG = 2
SUM_TOLERANCE = 1e-3


def is_public(config: dict[str, Any]) -> bool:
    """True for a model that clients ask."""
    return SPEC_PARAMETER in config.get("parameters", {}) and not STAGED.fullmatch(config["name"])


def ask(api: TritonHttp, config: dict[str, Any], *, timeout_s: float) -> list[float]:
    """Ask one public model; returns its probabilities.

    Raises ProofError if it refuses or answers with anything but probabilities, OSError if no answer comes.
    """
    name = config["name"]
    spec = ModelSpec.from_json(config["parameters"][SPEC_PARAMETER]["string_value"])
    bag = config["input"][0]["name"] == "tiles"
    shape = [BAG] if bag else [1, 1]
    tiles = [synthetic_tile(spec)] * (BAG if bag else 1)
    try:
        answer = api.infer_bytes(name, config["input"][0]["name"], tiles, shape, timeout_s=timeout_s)
    except Refused as error:
        raise ProofError(
            f"{name} is ready but refuses a synthetic {'bag' if bag else 'tile'}: {error}"
        ) from error
    got = answer.get("probabilities") or []
    if not _sums_to_one(got, len(spec.class_names)):
        raise ProofError(
            f"{name} answers a synthetic {'bag' if bag else 'tile'} with {got} instead of {len(spec.class_names)} "
            "probabilities that sum to 1."
        )
    if bag and not _sums_to_one(answer.get("attention") or [], BAG):
        raise ProofError(f"{name} answers a synthetic bag with the attention {answer.get('attention')}.")
    return [float(value) for value in got]


def _sums_to_one(values: list[Any], count: int) -> bool:
    numbers = [float("nan") if value is None else float(value) for value in values]
    return (
        len(numbers) == count
        and all(math.isfinite(number) and number >= 0 for number in numbers)
        and abs(sum(numbers) - 1) <= SUM_TOLERANCE
    )


@functools.lru_cache(maxsize=8)
def synthetic_tile(spec: ModelSpec) -> bytes:
    """A JPEG tile of `spec.tile_size_px` with a pink-violet gradient: no glass, no tissue, always the same."""
    side = spec.tile_size_px
    ramp = np.linspace(0, 255, side, dtype=np.float32)
    tile_HWC = np.empty((side, side, 3), dtype=np.uint8)
    tile_HWC[..., 0] = 180
    tile_HWC[..., 1] = (ramp / 2)[None, :]
    tile_HWC[..., 2] = ramp[:, None]
    return encode_tile(tile_HWC, spec.jpeg_quality)
