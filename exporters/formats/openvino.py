"""OpenVINO: its intermediate representation (`model.xml` + `model.bin`), for Triton's ``openvino`` backend.

Three formats, which differ in precision: ``openvino`` (FP32), ``openvino-bf16`` (FP32 graph, weights stored in 16 bits,
computed in BF16 by the backend's documented hint) and ``openvino-int8`` (from the quantised graph of ``onnx-int8``).

The native backend sets the batch of a model to `max_batch_size` and refuses smaller ones unless `ENABLE_BATCH_PADDING`
is on (`ValidateInputs` and `SetInputTensors` in src/openvino.cc of triton-inference-server/openvino_backend); it has a
hint for BF16, none for FP32, and OpenVINO itself prefers BF16 where the CPU has it. So on such a CPU the native
backend may answer in BF16 for ``openvino`` too; Clotline's embedded backend asks for FP32.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from exporters.errors import DamagedArtifactError, GraphError, UnavailableError
from exporters.formats.interface import (
    GIVES_WAY,
    TILES_INPUT,
    Artifact,
    Network,
    Runner,
    ServedFormat,
    answer_of,
)
from exporters.formats.onnx import first_line, quiet
from exporters.formats.openvino_rows import normalise_rows
from exporters.triton_config import OUTPUTS

_PARAMETERS = {
    "INFERENCE_NUM_THREADS": "1",
    "NUM_STREAMS": "1",
    "ENABLE_BATCH_PADDING": "YES",
    # A lone execution takes all cores, a network gives way to what feeds it, and each size of a batch has a graph of its own
    # (embedded backend only; the native one does not look for the names). exporters/cpu_layout.py drops what does not pay.
    "alone_thread_count": "0",
    "niceness": GIVES_WAY,
    "static_batches": "YES",
}


class OpenVino(ServedFormat):
    """See the module."""

    name = "openvino"
    machine = "cpu"
    backend = "openvino"
    artifact_filename = "model.xml"
    parameters: Mapping[str, str] = MappingProxyType(_PARAMETERS)
    computed_in = "f32"
    """OpenVINO's inference precision hint."""

    def require(self) -> None:
        """See ServedFormat."""
        if importlib.util.find_spec("openvino") is None:
            raise UnavailableError(
                f"{self.name} needs the package openvino, which is not installed: python -m pip install openvino"
            )

    def build(self, network: Network) -> Artifact:
        """See ServedFormat."""
        written, notes = self._onnx(network)
        return Artifact(_to_files(written, compress=self.computed_in == "bf16"), notes)

    def _onnx(self, network: Network) -> tuple[bytes, dict[str, Any]]:
        return network.onnx, {}

    def open(self, path: Path, outputs: Sequence[str] = OUTPUTS) -> Runner:
        """See ServedFormat; with one thread and stream, as served."""
        import openvino

        weights = path.with_suffix(".bin")
        if not weights.is_file():
            raise DamagedArtifactError(f"OpenVINO cannot open {path}: its weights {weights.name} are missing")
        try:
            core = openvino.Core()
            compiled = core.compile_model(
                core.read_model(str(path)),
                "CPU",
                {
                    "INFERENCE_NUM_THREADS": 1,
                    "NUM_STREAMS": 1,
                    "INFERENCE_PRECISION_HINT": self.computed_in,
                },
            )
            request = compiled.create_infer_request()
        except Exception as error:  # openvino raises RuntimeError with many lines
            raise DamagedArtifactError(f"OpenVINO cannot open {path}: {first_line(error)}") from error

        def run(tiles_NHWC: np.ndarray) -> Any:
            found = request.infer({TILES_INPUT: tiles_NHWC})
            return answer_of([np.array(found[name]) for name in outputs], outputs)

        return run


class OpenVinoBf16(OpenVino):
    """Computed in BF16, where the CPU can (AVX512-BF16, AMX)."""

    name = "openvino-bf16"
    precision = "bf16"
    baseline = "openvino"
    computed_in = "bf16"
    parameters: Mapping[str, str] = MappingProxyType({**_PARAMETERS, "HINT_BF16": "YES"})


class OpenVinoInt8(OpenVino):
    """From the QDQ graph of ``onnx-int8``."""

    name = "openvino-int8"
    precision = "int8"
    baseline = "openvino"
    calibrated = True

    def _onnx(self, network: Network) -> tuple[bytes, dict[str, Any]]:
        from exporters.formats.onnx_int8 import quantise

        return quantise(network)


def _to_files(written: bytes, *, compress: bool) -> dict[str, bytes]:
    import openvino

    with tempfile.TemporaryDirectory(prefix="clotline-openvino-") as scratch:
        source, target = Path(scratch, "model.onnx"), Path(scratch, "model.xml")
        source.write_bytes(written)
        try:
            with quiet():
                model = openvino.Core().read_model(str(source))
                normalise_rows(model)
                _number_names(model)
                openvino.save_model(model, str(target), compress_to_fp16=compress)
        except Exception as error:  # openvino raises RuntimeError with many lines
            raise GraphError(
                f"The network cannot be written for OpenVINO: {first_line(error)}. Export it as onnx."
            ) from error
        return {path.name: path.read_bytes() for path in (target, target.with_suffix(".bin"))}


def _number_names(model: Any) -> None:
    """Names that OpenVINO makes up are numbered on through a process: number them by their place in the graph."""
    for place, operation in enumerate(model.get_ordered_ops()):
        if re.fullmatch(rf"{operation.get_type_name()}_[0-9]+", operation.get_friendly_name()):
            operation.set_friendly_name(f"{operation.get_type_name()}_{place}")
