"""What a TensorRT engine says of itself, read from the file: its version, and the program that a TensorRT-RTX engine holds.

Both can be read without a GPU, where deserialising an engine, and so TensorRT's engine inspector, fails for want of a CUDA driver.

The version is four bytes at offset 24 (NVIDIA in https://github.com/NVIDIA/TensorRT/issues/3073; TensorRT-RTX 1.7 reads them
there too, and says so when they are changed).

An engine of TensorRT-RTX holds the program that it will compile for the GPU as text: every tensor with its name, size
and type, every convolution with the names of its operands. This is not documented; where a later version writes
something else, nothing is found, and whoever asked is told so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from exporters.errors import DamagedArtifactError, PrecisionError

_MAGIC = MappingProxyType({b"ftrt": "tensorrt", b"vtrt": "tensorrt_rtx"})
_VERSION_OFFSET = 24
_TYPES = MappingProxyType({"fp32": "float", "fp16": "half", "int8": "int8"})
"""Precision -> the program's word for it."""
_SMALL_BYTES = 4096
"""Scales, biases and shapes stay in other types; what is larger is weights."""
_TENSOR = re.compile(rb"tensor=\{ [^\n]*? type=[a-z0-9_]+ \}")
_NAME = re.compile(rb' name="([^"]+)"')
_TYPE = re.compile(rb" type=([a-z0-9_]+) \}$")
_CONSTANT = re.compile(rb" const_payload_size=([0-9]+) ")
_PRODUCT = re.compile(rb'(?:corrltn|gemm)=\{ name="[^"]*" output=\{[^}\n]*\} input=\{([^}\n]*)\}')
_OPERAND = re.compile(rb'"([^"]+)"')


@dataclass(frozen=True)
class EngineVersion:
    """Which TensorRT an engine belongs to.

    Attributes:
        module: "tensorrt" or "tensorrt_rtx".
        version: major.minor.patch.build, the last modulo 256.
    """

    module: str
    version: str


@dataclass(frozen=True)
class EngineProgram:
    """What the built engine computes in.

    Attributes:
        products: types of the two operands of the convolutions and matrix products, counted: {"half x half": 20}.
        weight_bytes: type -> bytes of constants larger than 4 kB.
    """

    products: Mapping[str, int]
    weight_bytes: Mapping[str, int]


def engine_version(content: bytes) -> EngineVersion | None:
    """The version that an engine says to be of; None where it is no engine, or of another header."""
    module = _MAGIC.get(content[:4])
    if module is None or len(content) < _VERSION_OFFSET + 4:
        return None
    return EngineVersion(module, ".".join(map(str, content[_VERSION_OFFSET : _VERSION_OFFSET + 4])))


def check_engine_version(content: bytes, module: str, version: str) -> None:
    """Refuse an engine of another TensorRT before its runtime sees it.

    Args:
        module: "tensorrt" or "tensorrt_rtx".
        version: of the runtime, as its `__version__`.

    Raises:
        DamagedArtifactError: it is no engine, or one of another version.
    """
    found = engine_version(content)
    if found is None:
        raise DamagedArtifactError(
            f"The file is no engine of {module}: it begins with {content[:4]!r}. Build it again."
        )
    told = [int(part) for part in re.findall(r"[0-9]+", version)[:4]]
    wanted = ".".join(str(part % 256) for part in told)
    same_length = ".".join(found.version.split(".")[: len(told)])
    if (found.module, same_length) != (module, wanted):
        raise DamagedArtifactError(
            f"The engine was built by {found.module} {found.version}, this is {module} {version}: an engine runs only under the "
            "version that built it. Build it again, with the version that will serve it."
        )


def engine_program(content: bytes) -> EngineProgram | None:
    """The program in an engine of TensorRT-RTX; None where none can be read."""
    types: dict[bytes, str] = {}
    weight_bytes: Counter[str] = Counter()
    for found in _TENSOR.finditer(content):
        name, kind = _NAME.search(found[0]), _TYPE.search(found[0])
        if name is None or kind is None:
            continue
        types[name[1]] = kind[1].decode()
        constant = _CONSTANT.search(found[0])
        if constant is not None and int(constant[1]) > _SMALL_BYTES:
            weight_bytes[types[name[1]]] += int(constant[1])
    products: Counter[str] = Counter()
    for found in _PRODUCT.finditer(content):
        operands = [types.get(name, "unknown") for name in _OPERAND.findall(found[1])[:2]]
        products[" x ".join(operands)] += 1
    if not weight_bytes:
        return None
    return EngineProgram(dict(products), dict(weight_bytes))


def check_program(name: str, precision: str, program: EngineProgram) -> None:
    """Hold a built engine to the precision that was asked for.

    Raises:
        PrecisionError: a product has an operand of another type, or weights are kept in another type.
    """
    wanted = _TYPES[precision]
    strays = {kind: count for kind, count in program.products.items() if kind != f"{wanted} x {wanted}"}
    if strays or set(program.weight_bytes) != {wanted}:
        raise PrecisionError(
            f"{name}: the built engine computes products in {dict(program.products)} and keeps weights as "
            f"{dict(program.weight_bytes)} (bytes by type), not only in {wanted}: it is not what was asked for. Nothing was "
            "published."
        )
