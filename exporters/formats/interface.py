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

from exporters.triton_config import CLASSIFIER_MODEL, NETWORK_PREFIX, NetworkTensors


class Answer(NamedTuple):
    """What a served network answers for N tiles and K classes."""

    probabilities: np.ndarray
    """float32 [N, K]; a row sums to 1."""
    confidence: np.ndarray
    """float32 [N, 1]; the largest probability of the row."""
    label_index: np.ndarray
    """int64 [N, 1]; where it stands."""


Runner = Callable[[np.ndarray], Answer]
"""Runs an artefact in this process: uint8 [N, S, S, 3] RGB -> Answer. May raise any error of its runtime."""


@dataclass(frozen=True)
class Network:
    """A trained network, and what formats need to know to write it down.

    Attributes:
        backbone: float32 [N, 3, S, S] normalised RGB -> logits float32 [N, K]; formats do not change it.
        mean: three numbers, of RGB in 0..1.
        std: three numbers, of RGB in 0..1.
        input_size_px: S.
        max_batch: most tiles in one execution.
        calibration_NHWC: uint8 [M, S, S, 3] RGB tiles that it was trained on, for INT8; None where none were given.
    """

    backbone: nn.Module
    mean: Sequence[float]
    std: Sequence[float]
    input_size_px: int
    max_batch: int = 8
    calibration_NHWC: np.ndarray | None = None

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
    tensors: NetworkTensors
    """Tensor names as the backend expects them."""
    parameters: Mapping[str, str] = MappingProxyType({})
    """The backend's parameters in config.pbtxt."""

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
    def open(self, path: Path) -> Runner:
        """Open an artefact in this process, given the path of its `artifact_filename`.

        Raises:
            GraphError: the file cannot be opened by the format's runtime.
        """
