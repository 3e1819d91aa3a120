"""AOTInductor: the network compiled to machine code in a `.pt2` package, PyTorch's successor of TorchScript.

Triton's ``pytorch`` backend runs it under the platform ``torch_aoti`` and names tensors after their place in the call:
``ARGS[0]``, ``RESULT[0]`` ... (src/pt2/model_state.cc and call_spec.cc of triton-inference-server/pytorch_backend).
The code is compiled for the instruction set of the machine that builds it, and it runs under the version of PyTorch
that built it; Triton's container has its own. So the file is proven in this process, and unproven on a server
of another version: build it inside the container that will serve it.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from exporters.errors import DamagedArtifactError, GraphError, UnavailableError
from exporters.formats.interface import Answer, Artifact, Network, Runner, ServedFormat
from exporters.formats.onnx import first_line, quiet
from exporters.served_graph import ServedGraph
from exporters.triton_config import NetworkTensors


class TorchAoti(ServedFormat):
    """See the module."""

    name = "torch-aoti"
    machine = "cpu"
    backend = "pytorch"
    platform = "torch_aoti"
    artifact_filename = "model.pt2"
    tensors = NetworkTensors(input="ARGS[0]", outputs=("RESULT[0]", "RESULT[1]", "RESULT[2]"))
    parameters: Mapping[str, str] = MappingProxyType({"INTRA_OP_THREAD_COUNT": "1"})

    def require(self) -> None:
        """See ServedFormat."""
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise UnavailableError(
                f"torch-aoti compiles C++ and {compiler} was not found: apt-get install g++, or set CXX to a compiler"
            )

    def unproven_here(self) -> str | None:
        """See ServedFormat."""
        return (
            "it runs in this process, but the embedded server has no torch_aoti, and Triton's container has a PyTorch of "
            "its own: build it there"
        )

    def build(self, network: Network) -> Artifact:
        """See ServedFormat."""
        graph = ServedGraph(network.backbone, network.mean, network.std, channels_last=False).eval()
        example = torch.zeros((2, network.input_size_px, network.input_size_px, 3), dtype=torch.uint8)
        logging.getLogger("torch._inductor").setLevel(logging.ERROR)
        with tempfile.TemporaryDirectory(prefix="clotline-aoti-") as scratch:
            target = Path(scratch, self.artifact_filename)
            try:
                with warnings.catch_warnings(), quiet(), torch.no_grad():
                    warnings.simplefilter("ignore")
                    batch = torch.export.Dim("batch", min=1, max=network.max_batch)
                    program = torch.export.export(
                        graph, (example,), dynamic_shapes=({0: batch},) if network.max_batch > 1 else None
                    )
                    torch._inductor.aoti_compile_and_package(program, package_path=str(target))
            except Exception as error:  # export and the compiler raise errors of many kinds
                raise GraphError(
                    f"The network cannot be written as AOTInductor package: {first_line(error)}. "
                    "Export it as torchscript."
                ) from error
            content = target.read_bytes()
        return Artifact(
            {self.artifact_filename: content},
            {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()},
        )

    def open(self, path: Path) -> Runner:
        """See ServedFormat."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                package = torch._inductor.aoti_load_package(str(path))
        except Exception as error:  # zip, JSON and loader errors
            raise DamagedArtifactError(f"PyTorch cannot open {path}: {first_line(error)}") from error

        def run(tiles_NHWC: np.ndarray) -> Answer:
            with torch.inference_mode():
                return Answer(*(value.numpy() for value in package(torch.from_numpy(tiles_NHWC))))

        return run
