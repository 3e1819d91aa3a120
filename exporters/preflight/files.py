"""What the files of a model need, read without any of the runtimes that load them."""

from __future__ import annotations

import ast
import contextlib
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.formats.engine_file import EngineVersion, engine_version

_CHECKOUT = Path(__file__).resolve().parents[2]
_OURS = ("slides",)
_PLAN_HEADER_BYTES = 28
_HEAD_BYTES = 1 << 16
_TAIL_BYTES = 1 << 16


class UnreadableError(Exception):
    """A file that is not what it should be; the message says what it is not."""


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file.

    Attributes:
        ir_version: of the file format.
        opsets: domain ("" is ONNX's own) -> version that is imported.
        operators: domain -> names of the operators that are used, in subgraphs, too; functions of the model left out.
        inputs, outputs: names.
        external: path beside the file -> bytes that have to be there.
    """

    ir_version: int
    opsets: Mapping[str, int]
    operators: Mapping[str, frozenset[str]]
    inputs: frozenset[str]
    outputs: frozenset[str]
    external: Mapping[str, int]


def read_onnx(path: Path) -> OnnxFile:
    """Raises UnreadableError: no ONNX file, or one that ends too early."""
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, OSError, ValueError
        raise UnreadableError(f"is not an ONNX file ({type(error).__name__})") from error
    if not model.graph.node or model.ir_version < 1:
        raise UnreadableError("is not an ONNX file (it has no nodes)")
    own = {(function.domain, function.name) for function in model.functions}
    operators: dict[str, set[str]] = {}
    external: dict[str, int] = {}
    for node, tensors in _walk([model.graph, *model.functions]):
        if node is not None and (node.domain, node.op_type) not in own:
            operators.setdefault(_domain(node.domain), set()).add(node.op_type)
        for tensor in tensors:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                about = {entry.key: entry.value for entry in tensor.external_data}
                end = int(about.get("offset", 0)) + int(about.get("length", 0))
                location = about.get("location", "")
                external[location] = max(external.get(location, 0), end)
    stored = {tensor.name for tensor in model.graph.initializer}
    return OnnxFile(
        model.ir_version,
        {_domain(entry.domain): entry.version for entry in model.opset_import},
        {domain: frozenset(names) for domain, names in operators.items()},
        frozenset(entry.name for entry in model.graph.input if entry.name not in stored),
        frozenset(entry.name for entry in model.graph.output),
        external,
    )


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _walk(graphs: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Every node of graphs and functions with the tensors in its attributes, and a graph's own tensors with None."""
    while graphs:
        graph = graphs.pop()
        yield None, list(getattr(graph, "initializer", ()))
        for node in graph.node:
            tensors = []
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    graphs.append(attribute.g)
                graphs.extend(attribute.graphs)
                if attribute.HasField("t"):
                    tensors.append(attribute.t)
                tensors.extend(attribute.tensors)
            yield node, tensors


def read_plan(path: Path) -> EngineVersion:
    """Which TensorRT an engine belongs to.

    Raises:
        UnreadableError: no engine.
    """
    with path.open("rb") as stream:
        found = engine_version(stream.read(_PLAN_HEADER_BYTES))
    if found is None:
        raise UnreadableError("is not a TensorRT engine (its first bytes are not 'ftrt')")
    return found


def read_archive(path: Path) -> str:
    """ "torchscript" or "pt2": what kind of PyTorch's archives a file is.

    Raises:
        UnreadableError: neither.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise UnreadableError(
            "is not an archive of PyTorch's (no zip file, or one that ends too early)"
        ) from error
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return "torchscript"
    if any("aotinductor" in name for name in names):
        return "pt2"
    raise UnreadableError("is a zip file, but neither TorchScript nor an AOTInductor package")


def read_openvino(path: Path) -> tuple[int, str | None]:
    """(version of the intermediate representation, version of the OpenVINO that wrote it or None).

    Raises:
        UnreadableError: no OpenVINO model.
    """
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES).decode("utf-8", "replace")
        stream.seek(0, 2)
        stream.seek(max(0, stream.tell() - _TAIL_BYTES))
        tail = stream.read().decode("utf-8", "replace")
    found = re.search(r"<net\b[^>]*\bversion=\"(\d+)\"", head)
    if found is None or "</net>" not in tail:
        raise UnreadableError("is not an OpenVINO model (no <net>, or no end of it)")
    writer = re.search(r"Runtime_version[^>]*value=\"(\d+\.\d+\.\d+)", tail)
    return int(found[1]), writer[1] if writer else None


def imported_modules(path: Path) -> frozenset[str]:
    """Top-level modules beside the standard library that a Python file imports, and that our own packages import for it.

    Raises:
        UnreadableError: no Python.
    """
    beside = {entry.stem for entry in path.parent.glob("*.py")}
    wanted: set[str] = set()
    seen: set[Path] = set()
    open_files = [(path, True)]
    while open_files:
        file, everywhere = open_files.pop()
        if file in seen:
            continue
        seen.add(file)
        for module in _imports(file, everywhere=everywhere):
            top = module.partition(".")[0]
            if top in sys.stdlib_module_names or top in beside:
                continue
            wanted.add(top)
            if top in _OURS:
                open_files += [(found, False) for found in _files_of(module)]
    return frozenset(wanted)


def _imports(file: Path, *, everywhere: bool) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text("utf-8"))
    except (SyntaxError, ValueError) as error:
        raise UnreadableError(f"is not Python ({error})") from error
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files_of(module: str) -> list[Path]:
    """Files of one of our modules and of the packages around it, as far as they exist."""
    parts = module.split(".")
    files = []
    for depth in range(1, len(parts) + 1):
        place = _CHECKOUT.joinpath(*parts[:depth])
        files += [file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()]
    return files


def is_importable(module: str, directories: Sequence[Path]) -> bool:
    """Whether a top-level module lies in one of these directories."""
    for directory in directories:
        with contextlib.suppress(OSError):
            if (directory / module).is_dir() or (directory / f"{module}.py").is_file():
                return True
            if any(directory.glob(f"{module}.*.so")):
                return True
    return False
