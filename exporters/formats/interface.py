"""What a served format is: how a network becomes a file, and how Triton and this process open it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from exporters.triton_config import NETWORK_PREFIX, NetworkTensors


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


class ServedFormat(ABC):
    """A file format in which a network is served, and the Triton backend that serves it."""

    name: str
    """As given to ``--formats``; the model is called ``tile_network_<name>``."""
    backend: str
    """Triton's name of the backend."""
    artifact_filename: str
    """The file in a version directory, as the native backend looks for it."""
    tensors: NetworkTensors
    """Tensor names as the backend expects them."""
    parameters: Mapping[str, str]
    """The backend's parameters in config.pbtxt."""

    @property
    def model_name(self) -> str:
        """Name of the Triton model that holds the network."""
        return f"{NETWORK_PREFIX}{self.name}"

    @abstractmethod
    def build(
        self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float], input_size_px: int
    ) -> bytes:
        """The artefact of a network whose batch dimension is free.

        Args:
            backbone: float32 [N, 3, S, S] normalised RGB -> logits float32 [N, K]; it is not changed.
            mean: three numbers, of RGB in 0..1.
            std: three numbers, of RGB in 0..1.
            input_size_px: S.

        Raises:
            GraphError: the network cannot be expressed in this format.
        """

    @abstractmethod
    def open(self, path: Path) -> Runner:
        """Open an artefact in this process.

        Raises:
            GraphError: the file cannot be opened by the format's runtime.
        """
