"""How the models of a release are called on a live server, and the public models that lead to them.

Every model of release number N is `<model>__rN`, with version 1. No model that answers is therefore ever loaded a second
time, and two releases may differ in everything. What clients ask is an ensemble of the public name with version N, whose
steps are those of `<public>__rN` (or `<public>__rN` itself, where that is a Python model). `clotline_release` is an ensemble
with all public ones as its steps: Triton loads what an ensemble is made of together with it, so that one request moves all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton

from serving.releases.errors import BadRelease

CONFIG = "config.pbtxt"
SWITCH_MODEL = "clotline_release"
RELEASE_PARAMETER = "clotline_release"
LIMITS_FOR_CLIENTS = ("max_tiles", "max_bag_bytes")  # clients keep to them
SPEC_PARAMETER = "clotline_spec"
NUMBERED = re.compile(r"(?P<name>.+)__r(?P<number>[0-9]+)")
HEADER = "# Written by `python -m serving release`; do not edit.\n"


def numbered(model: str, number: int) -> str:
    """Name of a model of release `number` on a live server."""
    return f"{model}__r{number}"


def number_of(directory_name: str) -> int | None:
    """The release that a model of a live repository belongs to; None for the public models."""
    found = NUMBERED.fullmatch(directory_name)
    return int(found["number"]) if found else None


def read_config(path: Path) -> triton.ModelConfig:
    """Read a config.pbtxt; raises BadRelease if it is none."""
    try:
        return text_format.Parse(path.read_text(), triton.ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise BadRelease(f"{path} is no Triton model configuration: {error}; export again.") from error


def to_text(config: triton.ModelConfig) -> str:
    """Content of config.pbtxt."""
    return HEADER + text_format.MessageToString(config)


def renamed(config: triton.ModelConfig, models: set[str], number: int, release_id: str) -> triton.ModelConfig:
    """The configuration of a model of release `number`.

    Renamed are the model itself, the steps of an ensemble, and each parameter whose whole value is the name of a model of
    the release (that is how Python models name the models that they ask). Models with a specification are told `release_id`.
    """
    new = triton.ModelConfig()
    new.CopyFrom(config)
    new.name = numbered(config.name, number)
    for step in new.ensemble_scheduling.step:
        step.model_name = numbered(step.model_name, number)
    for parameter in new.parameters.values():
        if parameter.string_value in models:
            parameter.string_value = numbered(parameter.string_value, number)
    if SPEC_PARAMETER in new.parameters:
        new.parameters[RELEASE_PARAMETER].string_value = release_id
    return new


def references(config: triton.ModelConfig, models: set[str]) -> set[str]:
    """Those of `models` that a model asks, as steps or as named by its parameters."""
    named = {step.model_name for step in config.ensemble_scheduling.step}
    return (named | {parameter.string_value for parameter in config.parameters.values()}) & models - {
        config.name
    }


def load_order(configs: Mapping[str, triton.ModelConfig]) -> list[str]:
    """Names with each model behind all that it asks. Raises BadRelease for models that ask one another."""
    waiting = {name: references(config, set(configs)) for name, config in configs.items()}
    order: list[str] = []
    while waiting:
        free = sorted(name for name, wants in waiting.items() if wants <= set(order))
        if not free:
            raise BadRelease(f"the models {', '.join(sorted(waiting))} ask one another in a circle.")
        order += free
        for name in free:
            del waiting[name]
    return order


def missing_steps(configs: Mapping[str, triton.ModelConfig]) -> list[str]:
    """What is wrong with ensembles: steps that the release does not have, or not pinned to version 1."""
    problems = []
    for name, config in sorted(configs.items()):
        for step in config.ensemble_scheduling.step:
            if step.model_name not in configs:
                problems.append(f"{name} asks {step.model_name}, which the release does not have")
            elif step.model_version != 1:
                problems.append(f"{name} asks version {step.model_version} of {step.model_name}, not 1")
    return problems


def label_files(config: triton.ModelConfig) -> list[str]:
    """Files beside config.pbtxt that name the classes of an output."""
    return sorted({output.label_filename for output in config.output if output.label_filename})


def public_config(name: str, entry: triton.ModelConfig, number: int, release_id: str) -> triton.ModelConfig:
    """The ensemble that clients ask as `name`, version `number`; label files lie in its version directory.

    Args:
        name: the public name.
        entry: configuration of `<name>__r<number>`.
        number: of the release.
        release_id: of the release, told in the parameter `clotline_release`.
    """
    if entry.HasField("ensemble_scheduling"):
        public = triton.ModelConfig()
        public.CopyFrom(entry)
    else:
        public = triton.ModelConfig(platform="ensemble", max_batch_size=entry.max_batch_size)
        step = public.ensemble_scheduling.step.add(model_name=entry.name, model_version=1)
        for tensor in entry.input:
            public.input.add(
                name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, optional=tensor.optional
            )
            step.input_map[tensor.name] = tensor.name
        for tensor in entry.output:
            public.output.add().CopyFrom(tensor)
            step.output_map[tensor.name] = tensor.name
        for key, parameter in entry.parameters.items():
            if key.startswith("clotline_") or key in LIMITS_FOR_CLIENTS:
                public.parameters[key].CopyFrom(parameter)
    public.name = name
    public.version_policy.specific.versions[:] = [number]
    for output in public.output:
        if output.label_filename:
            output.label_filename = f"{number}/{output.label_filename}"
    public.parameters[RELEASE_PARAMETER].string_value = release_id
    return public


def switch_config(
    public: Mapping[str, triton.ModelConfig], number: int, release_id: str
) -> triton.ModelConfig:
    """The ensemble `clotline_release`, whose load moves all public models. It is there to be loaded, not to be asked.

    Its tensors are those of all public models, as `<model>.<tensor>`; without a batch dimension of its own, because theirs
    may differ.
    """
    switch = triton.ModelConfig(name=SWITCH_MODEL, platform="ensemble", max_batch_size=0)
    switch.version_policy.specific.versions.append(number)
    switch.parameters[RELEASE_PARAMETER].string_value = release_id
    for name, config in sorted(public.items()):
        step = switch.ensemble_scheduling.step.add(model_name=name, model_version=-1)
        batch = [-1] if config.max_batch_size else []
        for tensor in config.input:
            own = f"{name}.{tensor.name}"
            switch.input.add(name=own, data_type=tensor.data_type, dims=[*batch, *tensor.dims])
            step.input_map[tensor.name] = own
        for tensor in config.output:
            own = f"{name}.{tensor.name}"
            switch.output.add(name=own, data_type=tensor.data_type, dims=[*batch, *tensor.dims])
            step.output_map[tensor.name] = own
    return switch
