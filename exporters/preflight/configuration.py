"""The configuration of a model: what it asks of the server before any file is opened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from google.protobuf.message import Message

from exporters.preflight import table
from exporters.preflight.findings import Finding, blocks, note, unknown
from exporters.preflight.table import Container, numbers
from exporters.triton_config import CONFIG_FILENAME, INSTANCE_KINDS, ModelConfig

ENSEMBLE = "ensemble"
_BACKEND_OF_PLATFORM = {
    "tensorrt_plan": "tensorrt",
    "onnxruntime_onnx": "onnxruntime",
    "pytorch_libtorch": "pytorch",
    "torch_aoti": "pytorch",
    "ensemble": ENSEMBLE,
}


@dataclass(frozen=True)
class Model:
    """A model of a repository.

    Attributes:
        name: of its directory.
        directory: with its versions.
        config: ModelConfig; None where there is none, or none that can be read.
        backend: "" where it is not known.
        findings: of the configuration.
    """

    name: str
    directory: Path
    config: Any
    backend: str
    findings: list[Finding]

    @property
    def is_public(self) -> bool:
        """Whether clients are told how to ask it: the exporter says so in a parameter."""
        return self.config is not None and "clotline_spec" in self.config.parameters

    @property
    def parts(self) -> list[tuple[str, int | None]]:
        """Models that it asks, and the version that it asks; None where it takes the newest."""
        if self.config is None:
            return []
        found: list[tuple[str, int | None]] = [
            (step.model_name, step.model_version if step.model_version > 0 else None)
            for step in self.config.ensemble_scheduling.step
        ]
        said = {name: value.string_value for name, value in self.config.parameters.items()}
        for name, value in sorted(said.items()):  # a Python model that asks others says so in its parameters
            if self.backend == "python" and name.endswith("_model") and value:
                version = said.get(f"{name.removesuffix('_model')}_version", "")
                found.append((value, int(version) if version.isdigit() and int(version) > 0 else None))
        return found


def read(directory: Path, container: Container) -> Model:
    """A model, and what its configuration says of its loading."""
    file = directory / CONFIG_FILENAME
    if not file.is_file():
        why = unknown(f"it has no {CONFIG_FILENAME}, and which one Triton makes up is not looked into")
        return Model(directory.name, directory, None, "", [why])
    findings = []
    config = ModelConfig()
    try:
        text = file.read_text("utf-8")
        try:
            text_format.Parse(text, config)
        except text_format.ParseError as error:
            if "has no field named" not in str(error):
                raise
            config = ModelConfig()
            text_format.Parse(text, config, allow_unknown_field=True)
            findings.append(_field_of_no_version(str(error), container))
    except (text_format.ParseError, OSError, UnicodeDecodeError) as error:
        why = blocks(f"{CONFIG_FILENAME} is no model configuration: {error}")
        return Model(directory.name, directory, None, "", [why])
    backend = config.backend or _BACKEND_OF_PLATFORM.get(config.platform, "")
    findings += _look_at_config(directory, config, backend, container)
    return Model(directory.name, directory, config, backend, findings)


def _field_of_no_version(message: str, container: Container) -> Finding:
    known_to, source = table.config_fields_known_to()
    triton = container.at_most("triton")
    if triton is not None and numbers(triton.value) <= numbers(known_to):
        return blocks(f"{CONFIG_FILENAME}: {message}: no Triton up to {known_to} has it", source)
    return unknown(f"{CONFIG_FILENAME}: {message}: Triton up to {known_to} does not have it", source)


def _look_at_config(directory: Path, config: Any, backend: str, container: Container) -> Iterator[Finding]:
    if config.name and config.name != directory.name:
        yield blocks(
            f"{CONFIG_FILENAME} names it {config.name!r}, its directory {directory.name!r}: rename one"
        )
    if not backend:
        yield unknown(f"{CONFIG_FILENAME} names neither backend nor platform")
    elif container.backends is None:
        yield unknown(f"which backends {container.name} has is not known")
    elif not container.backends:
        yield blocks(
            f"{container.name} is a base to build on, without tritonserver: take {container.tag}-py3"
        )
    elif backend not in container.backends:
        yield blocks(
            f"{container.name} has no backend {backend!r}, only {', '.join(sorted(container.backends))}"
            + ("" if container.is_embedded else f": take {container.tag}-py3, or export in another format")
        )
    yield from _look_at_fields(config, container)
    if any(group.kind == INSTANCE_KINDS["gpu"] for group in config.instance_group):
        if container.is_embedded:
            yield blocks(
                "it asks for a GPU (KIND_GPU), the embedded server runs on the CPU: --instance-kind cpu"
            )
        else:
            yield _gpu_note(container)
    for output in config.output:
        if output.label_filename and not (directory / output.label_filename).is_file():
            yield blocks(f"its labels {output.label_filename} are missing: copy them, or export again")


def _gpu_note(container: Container) -> Finding:
    said = [
        f"{words} {fact.value}"
        for name, words in (
            ("cuda", "CUDA"),
            ("driver", "driver from"),
            ("compute_capability", "compute capability from"),
        )
        if (fact := container.facts.get(name)) is not None
    ]
    cuda = container.facts.get("cuda")
    return note(
        f"it needs a GPU: {', '.join(said) or 'CUDA and driver are not known'}", cuda.source if cuda else ""
    )


def _look_at_fields(config: Any, container: Container) -> Iterator[Finding]:
    used = set(_fields(config))
    for name, since in table.config_fields().items():
        if name not in used:
            continue
        least, most = container.at_least("triton"), container.at_most("triton")
        if least is not None and numbers(least.value) >= numbers(since.value):
            continue
        text = f"{CONFIG_FILENAME} uses {name}, which came with Triton {since.value}"
        if most is not None and numbers(most.value) < numbers(since.value):
            yield blocks(
                f"{text}; {container.name} is older: leave it out, or take a newer one", since.source
            )
        else:
            yield unknown(f"{text}; the Triton of {container.name} is not known", since.source)


def _fields(message: Message) -> Iterator[str]:
    for descriptor, value in message.ListFields():
        yield f"{descriptor.containing_type.name}.{descriptor.name}"
        entries: Any = ()
        if descriptor.message_type is not None:
            is_map = descriptor.message_type.GetOptions().map_entry
            repeated = not isinstance(value, Message)
            entries = value.values() if is_map else value if repeated else (value,)
        for entry in entries:
            if isinstance(entry, Message):
                yield from _fields(entry)
