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
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from exporters.errors import DamagedArtifactError, GraphError, UnavailableError
from exporters.formats.interface import Artifact, Network, Runner, ServedFormat, answer_of
from exporters.formats.onnx import first_line, quiet
from exporters.formats.torchscript import WRITTEN_BY_THE_WRITER, refuse_damaged_zip
from exporters.triton_config import OUTPUTS, NetworkTensors


class TorchAoti(ServedFormat):
    """See the module."""

    name = "torch-aoti"
    machine = "cpu"
    backend = "pytorch"
    platform = "torch_aoti"
    artifact_filename = "model.pt2"
    parameters: Mapping[str, str] = MappingProxyType({"INTRA_OP_THREAD_COUNT": "1"})

    def tensors_of(self, outputs: Sequence[str]) -> NetworkTensors:
        """See ServedFormat."""
        return NetworkTensors(
            input="ARGS[0]", outputs=tuple(f"RESULT[{place}]" for place, _ in enumerate(outputs))
        )

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
        graph = network.graph(channels_last=False)
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
            content = _without_sources(target)
        return Artifact(
            {self.artifact_filename: content},
            {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()},
        )

    def open(self, path: Path, outputs: Sequence[str] = OUTPUTS) -> Runner:
        """See ServedFormat."""
        refuse_damaged_zip(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                package = torch._inductor.aoti_load_package(str(path))
        except Exception as error:  # zip, JSON and loader errors
            raise DamagedArtifactError(f"PyTorch cannot open {path}: {first_line(error)}") from error

        def run(tiles_NHWC: np.ndarray) -> Any:
            with torch.inference_mode():
                found = package(torch.from_numpy(tiles_NHWC))
            values = found if isinstance(found, (tuple, list)) else (found,)
            return answer_of([value.numpy() for value in values], outputs)

        return run


def _without_sources(package: Path) -> bytes:
    """A package without the C++ that its library was compiled from, which nothing reads and which differs every time."""
    target = package.with_name("bare") / package.name
    target.parent.mkdir()
    writer = torch._C.PyTorchFileWriter(str(target))
    with zipfile.ZipFile(package) as archive:
        for entry in archive.infolist():
            name = entry.filename.partition("/")[2]
            if not name.endswith(".cpp") and name not in WRITTEN_BY_THE_WRITER:
                record = archive.read(entry)
                writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    return target.read_bytes()
