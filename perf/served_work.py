"""What a tile classifier of a model repository computes, read from its config.pbtxt files: so that it can be done without
a server as well."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.errors import PerfInputError
from slides.native import DECODERS

RUNTIMES = ("onnxruntime", "openvino")
"""Backends whose networks LIMIT can run."""


@dataclass(frozen=True)
class ServedWork:
    """One tile classifier.

    Attributes:
        classifier: name of the ensemble.
        network: name of the network's model.
        runtime: its backend, one of RUNTIMES.
        path: the network's file.
        input: name of its input, UINT8 [N, S, S, 3].
        probabilities: name of its output with the probabilities.
        input_size_px: S.
        decoder: of plain JPEG tiles in LIMIT, one of DECODERS: the library that everyone has, or what the server uses where it was
            compiled.
    """

    classifier: str
    network: str
    runtime: str
    path: Path
    input: str
    probabilities: str
    input_size_px: int
    decoder: str = DECODERS[0]


def served_work(
    repository: Path, classifier: str = "tile_classifier", decoder: str = DECODERS[0]
) -> ServedWork:
    """Read what `classifier` of a model repository does; a Release's directory is taken for its `models`.

    Raises:
        PerfInputError: no such classifier, not of two steps, or a backend that this package has no bare loop for.
    """
    repository = models_of(repository)
    ensemble = config_of(repository, classifier)
    steps = list(ensemble.ensemble_scheduling.step)
    if len(steps) != 2:
        raise PerfInputError(
            f"{classifier} in {repository} has {len(steps)} steps; LIMIT knows preprocessing and one network."
        )
    step = steps[1]
    network = config_of(repository, step.model_name)
    if network.backend not in RUNTIMES:
        raise PerfInputError(
            f"{step.model_name} runs on the backend {network.backend!r}; LIMIT has a loop for {', '.join(RUNTIMES)}. "
            "Compare with another classifier of the same checkpoint: --limit-classifier."
        )
    version = step.model_version if step.model_version > 0 else _newest(repository / step.model_name)
    path = repository / step.model_name / str(version) / network.default_model_filename
    theirs = {ours: name for name, ours in step.output_map.items()}
    if "probabilities" not in theirs or not path.is_file():
        raise PerfInputError(f"{path} is missing, or {classifier} has no output `probabilities`.")
    return ServedWork(
        classifier=classifier,
        network=step.model_name,
        runtime=network.backend,
        path=path.resolve(),
        input=network.input[0].name,
        probabilities=theirs["probabilities"],
        input_size_px=int(network.input[0].dims[0]),
        decoder=decoder,
    )


def models_of(directory: Path) -> Path:
    """The model repository: `directory`, or its `models` if it is a Release. Raises PerfInputError."""
    directory = directory / "models" if (directory / "release.json").is_file() else directory
    if not directory.is_dir():
        raise PerfInputError(
            f"{directory} is no directory; `python -m perf models` makes a repository to measure."
        )
    return directory


def config_of(repository: Path, model: str) -> Any:
    """Configuration of a model; raises PerfInputError if there is none, or it cannot be read."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    path = repository / model / "config.pbtxt"
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except FileNotFoundError:
        there = sorted(entry.parent.name for entry in repository.glob("*/config.pbtxt"))
        raise PerfInputError(
            f"{repository} holds no model {model} (it has {', '.join(there) or 'none'})."
        ) from None
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise PerfInputError(f"{path} cannot be read: {error}") from error


def _newest(model: Path) -> int:
    versions = [int(entry.name) for entry in model.iterdir() if entry.name.isdecimal()]
    if not versions:
        raise PerfInputError(f"{model} holds no version.")
    return max(versions)
