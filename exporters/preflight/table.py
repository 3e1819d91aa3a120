"""What is known of Triton's containers: `containers.json`, where every fact names its source.

A fact is a version as it is written there. Where a container's own is not known, its neighbours' bound it: NVIDIA's containers
do not go back to older parts. Nothing else is concluded; what is not listed is unknown.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from exporters.errors import FormatError

EMBEDDED = "embedded"
DEFAULT_VARIANT = "py3"
_FILE = Path(__file__).resolve().parent / "containers.json"
_TAG = re.compile(r"(\d\d\.\d\d)(?:-([a-z0-9-]+))?")


class Fact(NamedTuple):
    """A version, and where it is said."""

    value: str
    source: str


class OnnxLimits(NamedTuple):
    """The newest ONNX files that a version of ONNX Runtime opens, measured with its wheel.

    `data_outside`: whether it reads weights from outside the directory of the model.
    """

    ir_version: int
    opset: int
    ml_opset: int
    data_outside: bool
    source: str


@dataclass(frozen=True)
class Container:
    """One image of Triton's, or the embedded server.

    Attributes:
        tag: "26.07", or "embedded".
        variant: "py3", "trtllm-python-py3" ...; "" for the embedded server.
        listed: whether the table has the tag at all.
        facts: name ("triton", "onnxruntime", "openvino", "pytorch", "tensorrt", "python", "cuda", "driver",
            "compute_capability", "torch_aoti") -> fact.
        least, most: the same of the nearest older and newer containers.
        backends: names; None where they are not known.
        modules: Python modules beside the standard library; None where they are not known.
        modules_source: where that is said.
        search_path: directories in which the server's Python looks for modules; of the embedded server only.
    """

    tag: str
    variant: str
    listed: bool
    facts: Mapping[str, Fact]
    least: Mapping[str, Fact] = field(default_factory=dict)
    most: Mapping[str, Fact] = field(default_factory=dict)
    backends: frozenset[str] | None = None
    modules: frozenset[str] | None = None
    modules_source: str = ""
    search_path: Sequence[Path] = ()

    @property
    def name(self) -> str:
        """As people write it."""
        return "the embedded server" if self.tag == EMBEDDED else f"{self.tag}-{self.variant}"

    @property
    def is_embedded(self) -> bool:
        """Whether it is ours and not one of NVIDIA's."""
        return self.tag == EMBEDDED

    def at_least(self, name: str) -> Fact | None:
        """The version, or the newest that is known to be no newer than it."""
        return self.facts.get(name) or self.least.get(name)

    def at_most(self, name: str) -> Fact | None:
        """The version, or the oldest that is known to be no older than it."""
        return self.facts.get(name) or self.most.get(name)

    def said(self, name: str) -> str:
        """The version in words: "2.71.0", "2.53.0 to 2.69.0", "2.10 or newer", "unknown"."""
        own, least, most = self.facts.get(name), self.least.get(name), self.most.get(name)
        if own is not None:
            return own.value
        if least is not None and most is not None:
            return least.value if least.value == most.value else f"{least.value} to {most.value}"
        return f"{least.value} or newer" if least else f"{most.value} or older" if most else "unknown"


def numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version, to be compared: "2.9.0a0+50eac81" -> (2, 9, 0)."""
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))  # type: ignore[index]


def tags() -> list[str]:
    """All listed tags, oldest first."""
    return sorted(_table()["containers"])


def container(name: str) -> Container:
    """A container of the table: "26.07", "26.07-py3", "25.12-trtllm-python-py3"; not the embedded server.

    A tag that is not listed gives one with bounds only.

    Raises:
        FormatError: no tag, or no variant of NVIDIA's.
    """
    found = _TAG.fullmatch(name.strip())
    if found is None:
        raise FormatError(
            f"{name!r} is no tag of a Triton container: give one such as 26.07 or 26.07-py3, or {EMBEDDED}."
        )
    tag, variant = found[1], found[2] or DEFAULT_VARIANT
    table = _table()
    if variant not in table["variants"]:
        raise FormatError(
            f"{variant!r} is no variant that is known; there are {', '.join(table['variants'])}."
        )
    about = table["variants"][variant]
    own = table["containers"].get(tag, {})
    facts = _facts(own.get(variant, {}))
    older, newer = [t for t in tags() if t < tag], [t for t in tags() if t > tag]
    packages = about.get("packages")
    return Container(
        tag,
        variant,
        tag in table["containers"],
        MappingProxyType(facts),
        _nearest(older[::-1], variant),
        _nearest(newer, variant),
        frozenset(about["backends"]),
        frozenset(packages) if packages is not None else None,
        _source(about["packages_source"]) if packages is not None else "",
    )


def nearest_tags(tag: str) -> list[str]:
    """The listed tags before and after one that is not listed."""
    older, newer = [t for t in tags() if t < tag], [t for t in tags() if t > tag]
    return [*older[-1:], *newer[:1]]


def onnx_limits(version: str) -> OnnxLimits | None:
    """What a version of ONNX Runtime opens; None where that was not measured."""
    major, minor = numbers(version)[:2]
    found = _table()["onnxruntime"].get(f"{major}.{minor}")
    return (
        OnnxLimits(
            found["ir_version"],
            found["opset"],
            found["ai.onnx.ml"],
            found["data_outside"],
            _source(found["source"]),
        )
        if found
        else None
    )


def onnx_surely(here: Container) -> OnnxLimits | None:
    """What the ONNX Runtime of a container opens at least; None where that is not known.

    A version with a commit ("1.23.0+1d1712f") is between two releases: it is held to the older one.
    """
    own = here.facts.get("onnxruntime")
    fact = own if own is not None and "+" not in own.value else here.least.get("onnxruntime")
    return onnx_limits(fact.value) if fact is not None else None


def onnx_at_best(here: Container) -> OnnxLimits | None:
    """What it opens at most; None where that is not known."""
    fact = here.at_most("onnxruntime")
    return onnx_limits(fact.value) if fact is not None else None


def newest_loadable(name: str) -> tuple[int, int]:
    """(opset, IR version) of the newest ONNX file that a container surely opens; "embedded" works, too.

    Raises:
        FormatError: the container, or what its ONNX Runtime opens, is not known.
    """
    if name == EMBEDDED:
        from exporters.preflight.embedded import embedded_server

        chosen = embedded_server()
    else:
        chosen = container(name)
        if not chosen.listed:
            raise FormatError(
                f"{chosen.tag} is not in the table of containers; the nearest are "
                f"{', '.join(nearest_tags(chosen.tag))}, the newest is {tags()[-1]}."
            )
    limits = onnx_surely(chosen)
    if limits is None:
        raise FormatError(f"Which ONNX files {chosen.name} opens is not known; choose another container.")
    return limits.opset, limits.ir_version


def readers_of(ir_version: int, opset: int) -> list[str]:
    """Listed tags whose py3 image surely opens such an ONNX file, oldest first."""
    found = []
    for tag in tags():
        limits = onnx_surely(container(tag))
        if limits is not None and ir_version <= limits.ir_version and opset <= limits.opset:
            found.append(tag)
    return found


def contrib_operators() -> Mapping[str, str]:
    """Operators of com.microsoft -> ONNX Runtime that first had them, of those measured."""
    return {name: since for since, names in _table()["contrib_operators"].items() for name in names}


def config_fields() -> Mapping[str, Fact]:
    """Fields of ModelConfig that came with a version of Triton, "Message.field" -> that version; others are older."""
    return {name: Fact(*fact) for name, fact in _table()["config_fields"].items()}


def config_fields_known_to() -> Fact:
    """The newest Triton whose fields of ModelConfig were looked at."""
    return Fact(*_table()["config_fields_known_to"])


def http_limit_bytes() -> tuple[int, str]:
    """Default of --http-max-input-size, and where it is said."""
    value, source = _table()["http_max_input_bytes"]
    return int(value), _source(source)


def source(key: str) -> str:
    """Address of a source that rules cite."""
    return _source(key)


def _facts(entries: Mapping[str, Any]) -> dict[str, Fact]:
    return {name: Fact(value, _source(key)) for name, (value, key) in entries.items()}


def _nearest(others: Sequence[str], variant: str) -> Mapping[str, Fact]:
    found: dict[str, Fact] = {}
    for tag in others:
        for name, fact in _facts(_table()["containers"][tag].get(variant, {})).items():
            found.setdefault(name, fact)
    return MappingProxyType(found)


def _source(key: str) -> str:
    return str(_table()["sources"][key]["url"]) if not key.startswith("https:") else key


@functools.cache
def _table() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(_FILE.read_text("utf-8"))
    return document
