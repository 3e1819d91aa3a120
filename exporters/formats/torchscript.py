"""TorchScript: a traced and frozen module, for Triton's ``pytorch`` backend.

The native backend knows tensors by place, not by name: ``<name>__<index>``
(https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md,
"Special Conventions for PyTorch Backend").
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from exporters.errors import DamagedArtifactError, GraphError
from exporters.formats.interface import (
    TILES_INPUT,
    Artifact,
    Network,
    Runner,
    ServedFormat,
    answer_of,
)
from exporters.triton_config import OUTPUTS, NetworkTensors

_MANGLED = re.compile(rb"___torch_mangle_([0-9]+)")
WRITTEN_BY_THE_WRITER = frozenset({"version", ".data/version", "byteorder", ".data/serialization_id"})


class TorchScript(ServedFormat):
    """See the module."""

    name = "torchscript"
    backend = "pytorch"
    artifact_filename = "model.pt"
    parameters: Mapping[str, str] = MappingProxyType({"INTRA_OP_THREAD_COUNT": "1"})

    def tensors_of(self, outputs: Sequence[str]) -> NetworkTensors:
        """See ServedFormat."""
        return NetworkTensors(
            input=f"{TILES_INPUT}__0", outputs=tuple(f"{name}__{place}" for place, name in enumerate(outputs))
        )

    def build(self, network: Network) -> Artifact:
        """See ServedFormat. Freezing folds batch normalisation into the convolutions."""
        graph = network.graph(channels_last=True)
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
        return Artifact({self.artifact_filename: _reproducible(written.getvalue())})

    def open(self, path: Path, outputs: Sequence[str] = OUTPUTS) -> Runner:
        """See ServedFormat."""
        refuse_damaged_zip(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = torch.jit.load(io.BytesIO(path.read_bytes()), map_location="cpu")
        except Exception as error:  # torch raises RuntimeError, OSError, UnpicklingError and more
            raise DamagedArtifactError(
                f"PyTorch cannot open {path}: {type(error).__name__}: {error}"
            ) from error

        def run(tiles_NHWC: np.ndarray) -> Any:
            with torch.inference_mode():
                found = module(torch.from_numpy(tiles_NHWC))
            values = found if isinstance(found, tuple) else (found,)
            return answer_of([value.numpy() for value in values], outputs)

        return run


def _reproducible(written: bytes) -> bytes:
    """The same archive without what differs from one writing to the next.

    Classes of traces are numbered on through a process (`___torch_mangle_12`): here anew. `.debug_pkl` entries hold
    paths of this machine, and are read for tracebacks only: they are left out.
    """
    content = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(content)
    with zipfile.ZipFile(io.BytesIO(written)) as archive:
        names = [entry.filename for entry in archive.infolist()]
        numbers = {int(number) for name in names for number in _MANGLED.findall(name.encode())}
        anew = {number: place for place, number in enumerate(sorted(numbers))}

        def renumber(text: bytes) -> bytes:
            return _MANGLED.sub(lambda found: b"___torch_mangle_%d" % anew[int(found[1])], text)

        for filename in names:
            name, record = filename.partition("/")[2], archive.read(filename)
            if name.endswith(".debug_pkl") or name in WRITTEN_BY_THE_WRITER:
                continue
            if name.startswith("code/") or name == "data.pkl":
                name, record = renumber(name.encode()).decode(), renumber(record)
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    return content.getvalue()


def refuse_damaged_zip(path: Path) -> None:
    """PyTorch's archives are zip files, and it reads them without looking at their checksums.

    Raises:
        DamagedArtifactError: it is none, or an entry is not what was written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
        raise DamagedArtifactError(f"PyTorch cannot open {path}: {error}") from error
    if damaged is not None:
        raise DamagedArtifactError(f"{path} is damaged: its entry {damaged} does not have its checksum.")
