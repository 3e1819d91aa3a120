"""The formats in which a network is served, a module each, behind :class:`ServedFormat`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from exporters.errors import FormatError

if TYPE_CHECKING:
    from exporters.formats.interface import ServedFormat

FORMATS = MappingProxyType(
    {
        "onnx": "onnx.Onnx",
        "onnx-fp16": "onnx_fp16.OnnxFp16",
        "onnx-int8": "onnx_int8.OnnxInt8",
        "torchscript": "torchscript.TorchScript",
        "torch-aoti": "torch_aoti.TorchAoti",
        "openvino": "openvino.OpenVino",
        "openvino-bf16": "openvino.OpenVinoBf16",
        "openvino-int8": "openvino.OpenVinoInt8",
        "tensorrt": "tensorrt.TensorRt",
        "tensorrt-fp16": "tensorrt.TensorRtFp16",
        "tensorrt-int8": "tensorrt.TensorRtInt8",
        "tensorrt-rtx": "tensorrt.TensorRtRtx",
        "tensorrt-rtx-fp16": "tensorrt.TensorRtRtxFp16",
        "tensorrt-rtx-int8": "tensorrt.TensorRtRtxInt8",
    }
)
"""Name of a format -> module and class; a module is imported when its format is asked for."""


def formats_named(names: Sequence[str]) -> list[ServedFormat]:
    """The formats of these names, in their order.

    Raises:
        FormatError: no name, an unknown one, or one twice.
    """
    if not names:
        raise FormatError(f"No format was named; choose from {', '.join(FORMATS)}.")
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise FormatError(
            f"Unknown format {', '.join(map(repr, unknown))}; Clotline exports {', '.join(FORMATS)}."
        )
    if len(set(names)) != len(names):
        raise FormatError(f"A format is named twice in {','.join(names)}; name each once.")
    return [_format(name) for name in names]


def _format(name: str) -> ServedFormat:
    module, class_name = FORMATS[name].split(".")
    fmt: ServedFormat = getattr(importlib.import_module(f"{__name__}.{module}"), class_name)()
    return fmt
