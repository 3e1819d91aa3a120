"""TorchScript: a traced and frozen module, for Triton's ``pytorch`` backend.

The native backend knows tensors by place, not by name: ``<name>__<index>``
(https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md,
"Special Conventions for PyTorch Backend").
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from exporters.errors import DamagedArtifactError, GraphError
from exporters.formats.interface import Answer, Artifact, Network, Runner, ServedFormat
from exporters.served_graph import ServedGraph
from exporters.triton_config import NetworkTensors


class TorchScript(ServedFormat):
    """See the module."""

    name = "torchscript"
    backend = "pytorch"
    artifact_filename = "model.pt"
    tensors = NetworkTensors(
        input="tiles__0", outputs=("probabilities__0", "confidence__1", "label_index__2")
    )
    parameters: Mapping[str, str] = MappingProxyType({"INTRA_OP_THREAD_COUNT": "1"})

    def build(self, network: Network) -> Artifact:
        """See ServedFormat. Freezing folds batch normalisation into the convolutions."""
        graph = ServedGraph(network.backbone, network.mean, network.std, channels_last=True).eval()
        example = torch.zeros((2, network.input_size_px, network.input_size_px, 3), dtype=torch.uint8)
        written = io.BytesIO()
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                # The parity gate checks the trace, on other inputs and batch sizes than the example's.
                traced = torch.jit.trace(graph, example, check_trace=False)
                torch.jit.save(torch.jit.freeze(traced), written)
        except Exception as error:  # tracing runs the network's own code, which may raise anything
            raise GraphError(
                f"The network cannot be written as TorchScript: {type(error).__name__}: {error}. "
                "Export it as onnx, or change the architecture."
            ) from error
        return Artifact({self.artifact_filename: written.getvalue()})

    def open(self, path: Path) -> Runner:
        """See ServedFormat."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = torch.jit.load(io.BytesIO(path.read_bytes()), map_location="cpu")
        except Exception as error:  # torch raises RuntimeError, OSError, UnpicklingError and more
            raise DamagedArtifactError(
                f"PyTorch cannot open {path}: {type(error).__name__}: {error}"
            ) from error

        def run(tiles_NHWC: np.ndarray) -> Answer:
            with torch.inference_mode():
                probabilities, confidence, label_index = module(torch.from_numpy(tiles_NHWC))
            return Answer(probabilities.numpy(), confidence.numpy(), label_index.numpy())

        return run
