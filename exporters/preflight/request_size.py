"""How large the requests of a model can be, against what Triton takes by HTTP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from exporters.preflight import table
from exporters.preflight.configuration import Model
from exporters.preflight.findings import Finding, note

_BYTES_OF_TYPE = {"BOOL": 1, "UINT8": 1, "INT8": 1, "UINT16": 2, "INT16": 2, "FP16": 2, "BF16": 2, "UINT32": 4,
                  "INT32": 4, "FP32": 4, "UINT64": 8, "INT64": 8, "FP64": 8}  # fmt: skip


def largest_request_bytes(model: Model, known: Mapping[str, Model]) -> int | None:
    """Bytes of a request with a full batch, as far as shapes and parameters bound it."""
    if model.config is None:
        return None
    said = model.config.parameters
    if "max_bag_bytes" in said:
        return _whole(said["max_bag_bytes"].string_value)
    total = 0
    for entry in model.config.input:
        kind = _type_name(entry)
        each = _BYTES_OF_TYPE.get(kind) or _longest_string(model, known)
        if each is None or any(dim < 0 for dim in entry.dims):
            return None
        total += each * math.prod(entry.dims) * max(1, model.config.max_batch_size)
    return total or None


def _type_name(entry: Any) -> str:
    descriptor = entry.DESCRIPTOR.fields_by_name["data_type"].enum_type
    return str(descriptor.values_by_number[entry.data_type].name).removeprefix("TYPE_")


def _longest_string(model: Model, known: Mapping[str, Model]) -> int | None:
    """What `max_tile_bytes` of the model, or of the models that it asks, allows."""
    asked = [model, *(known[name] for name, _ in model.parts if name in known)]
    for candidate in asked:
        if candidate.config is not None and "max_tile_bytes" in candidate.config.parameters:
            return _whole(candidate.config.parameters["max_tile_bytes"].string_value)
    return None


def _whole(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def http_note(largest_bytes: int | None) -> Finding | None:
    """What to say of a model whose largest request HTTP would refuse."""
    limit, source = table.http_limit_bytes()
    if largest_bytes is None or largest_bytes <= limit:
        return None
    return note(
        f"a full request may have {largest_bytes:,} bytes, HTTP takes {limit:,}: send fewer at once, ask by gRPC, or start "
        f"tritonserver with --http-max-input-size={largest_bytes + largest_bytes // 64}",
        source,
    )
