"""What a served format is: how a network becomes files, and how Triton and this process open them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from exporters.triton_config import CLASSIFIER_MODEL, NETWORK_PREFIX, OUTPUTS, NetworkTensors

GIVES_WAY = "10"
"""Niceness (nice(2)) of a network: what feeds it with tiles has a core first (docs/performance.md)."""
TILES_INPUT = "tiles"
"""Name of the input, where the backend lets us choose it."""


class Answer(NamedTuple):
    """What a served network answers for N tiles and K classes."""

    probabilities: np.ndarray
    """float32 [N, K]; a row sums to 1."""
    confidence: np.ndarray
    """float32 [N, 1]; the largest probability of the row."""
    label_index: np.ndarray
    """int64 [N, 1]; where it stands."""


Runner = Callable[[np.ndarray], Any]
"""Runs an artefact in this process: uint8 [N, S, S, 3] RGB -> Answer, or for other outputs than a classifier's a tuple of
arrays in their order. May raise any error of its runtime."""


def answer_of(values: Sequence[np.ndarray], outputs: Sequence[str]) -> Any:
    """What a Runner gives: an Answer for a classifier's outputs, else a tuple."""
    return Answer(*values) if tuple(outputs) == OUTPUTS else tuple(values)


@dataclass(frozen=True)
class OnnxTarget:
    """What the ONNX Runtime that will serve reads.

    Attributes:
        opset: version of the operators; 18 is the oldest that the exporter writes without converting.
        ir_version: latest version of the file format; IR 10 loads from ONNX Runtime 1.18 on.
    """

    opset: int = 18
    ir_version: int = 10

    @classmethod
    def within(cls, opset: int, ir_version: int) -> OnnxTarget:
        """The default, or less where a runtime reads no more than this."""
        return cls(min(cls.opset, opset), min(cls.ir_version, ir_version))


@dataclass(frozen=True)
class Network:
    """A trained network, and what formats need to know to write it down.

    Attributes:
        backbone: float32 [N, 3, S, S] normalised RGB -> logits float32 [N, K], or for an encoder its embedding float32
            [N, D]; formats do not change it.
        mean: three numbers, of RGB in 0..1.
        std: three numbers, of RGB in 0..1.
        input_size_px: S.
        max_batch: most tiles in one execution.
        calibration_NHWC: uint8 [M, S, S, 3] RGB tiles that it was trained on, for INT8; None where none were given.
        outputs: names of what the served graph answers: OUTPUTS of a classifier, or one name of an encoder's embedding.
        onnx_target: what has to be able to read the ONNX file.
    """

    backbone: nn.Module
    mean: Sequence[float]
    std: Sequence[float]
    input_size_px: int
    max_batch: int = 8
    calibration_NHWC: np.ndarray | None = None
    outputs: tuple[str, ...] = OUTPUTS
    onnx_target: OnnxTarget = field(default_factory=OnnxTarget)

    def graph(self, *, channels_last: bool) -> nn.Module:
        """The graph that is served, in evaluation mode: see `exporters.served_graph`."""
        from exporters.served_graph import EmbeddingGraph, ServedGraph

        kind = ServedGraph if self.outputs == OUTPUTS else EmbeddingGraph
        return kind(self.backbone, self.mean, self.std, channels_last=channels_last).eval()

    @cached_property
    def onnx(self) -> bytes:
        """The network as FP32 ONNX, which most formats start from: written once; raises GraphError."""
        from exporters.formats.onnx import write_onnx

        return write_onnx(self)


@dataclass(frozen=True)
class Artifact:
    """What a format wrote.

    Attributes:
        files: name in the version directory -> content; `ServedFormat.artifact_filename` is one of them.
        notes: JSON types, what is worth knowing of how it was made; published with the release.
    """

    files: Mapping[str, bytes]
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(map(len, self.files.values()))


class ServedFormat(ABC):
    """A file format in which a network is served, and the Triton backend that serves it."""

    name: str
    """As given to ``--formats``."""
    precision: str = "fp32"
    """Row of `exporters.tolerances.TOLERANCES` that the gate holds it to."""
    machine: str = "any"
    """Kind of machine it is meant for: ``cpu``, ``gpu``, or ``any``."""
    baseline: str | None = None
    """Name of the FP32 format that one of a lower precision has to beat; None for FP32 itself."""
    calibrated: bool = False
    """Whether `build` needs `Network.calibration_NHWC`."""
    backend: str
    """Triton's name of the backend."""
    platform: str = ""
    """Triton's name of the platform, for backends that tell their formats apart by it."""
    artifact_filename: str
    """The file in a version directory that the native backend looks for."""
    parameters: Mapping[str, str] = MappingProxyType({})
    """The backend's parameters in config.pbtxt."""

    @property
    def tensors(self) -> NetworkTensors:
        """Names of a classifier's tensors as the backend expects them."""
        return self.tensors_of(OUTPUTS)

    def tensors_of(self, outputs: Sequence[str]) -> NetworkTensors:
        """Names of the tensors of a network with these outputs, as the backend expects them."""
        return NetworkTensors(input=TILES_INPUT, outputs=tuple(outputs))

    @property
    def model_name(self) -> str:
        """Name of the Triton model that holds the network."""
        return f"{NETWORK_PREFIX}{self.name.replace('-', '_')}"

    @property
    def classifier_name(self) -> str:
        """Name of the ensemble of its own."""
        return f"{CLASSIFIER_MODEL}_{self.name.replace('-', '_')}"

    def require(self) -> None:  # noqa: B027  (most formats need nothing more)
        """Look whether the format can be built on this machine.

        Raises:
            UnavailableError: it cannot; the message says what it needs and how to get it.
        """

    def unproven_here(self) -> str | None:
        """Why this machine cannot show that the format runs as it should, or None if it can."""
        return None

    def runs_here(self) -> bool:
        """Whether `open` can be asked for a runner on this machine; if not, the format says why in `unproven_here`."""
        return True

    @abstractmethod
    def build(self, network: Network) -> Artifact:
        """Write a network whose batch dimension is free.

        Raises:
            GraphError: the network cannot be expressed in this format.
        """

    @abstractmethod
    def open(self, path: Path, outputs: Sequence[str] = OUTPUTS) -> Runner:
        """Open an artefact in this process, given the path of its `artifact_filename`.

        Args:
            outputs: of the network, as `Network.outputs`.

        Raises:
            GraphError: the file cannot be opened by the format's runtime.
        """

    def open_baseline(self, path: Path, outputs: Sequence[str] = OUTPUTS) -> Runner:
        """Open the artefact of `baseline` on the device that this format is meant for, so that it is timed where this one is.

        Raises:
            GraphError: as `open`.
        """
        from exporters.formats import formats_named

        if self.baseline is None:
            raise ValueError(f"{self.name} has no format to beat")
        return formats_named([self.baseline])[0].open(path, outputs)
