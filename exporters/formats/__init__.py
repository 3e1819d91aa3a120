"""The formats in which a network is served, a module each, behind :class:`ServedFormat`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from exporters.errors import FormatError

if TYPE_CHECKING:
    from exporters.formats.interface import ServedFormat

FORMATS = MappingProxyType({"onnx": "Onnx", "torchscript": "TorchScript"})
"""Name of a format -> class in the module of that name; a module is imported when its format is asked for."""


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
    return [getattr(importlib.import_module(f"{__name__}.{name}"), FORMATS[name])() for name in names]
