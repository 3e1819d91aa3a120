"""ONNX: one file with its weights inside, for Triton's ``onnxruntime`` backend.

Opset 18 and IR version 10 load in ONNX Runtime from 1.18 on, so also in Triton containers whose runtime is
older than the one that exported.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from exporters.errors import DamagedArtifactError, GraphError
from exporters.formats.interface import Answer, Artifact, Network, Runner, ServedFormat
from exporters.served_graph import ServedGraph
from exporters.triton_config import OUTPUTS, NetworkTensors

OPSET = 18
LATEST_IR_VERSION = 10
_PROTOBUF_LIMIT_BYTES = 2**31 - 1
_NOISY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


class Onnx(ServedFormat):
    """See the module."""

    name = "onnx"
    backend = "onnxruntime"
    artifact_filename = "model.onnx"
    tensors = NetworkTensors(input="tiles", outputs=OUTPUTS)
    # One thread an execution: parallel work comes from instances and batches, which do not wait for each other.
    parameters: Mapping[str, str] = MappingProxyType({"intra_op_thread_count": "1"})

    def build(self, network: Network) -> Artifact:
        """See ServedFormat. The file passes onnx.checker with full shape inference."""
        return Artifact({self.artifact_filename: network.onnx})

    def open(self, path: Path) -> Runner:
        """See ServedFormat."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1  # as served
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no root of their own
            raise DamagedArtifactError(f"ONNX Runtime cannot open {path}: {first_line(error)}") from error

        def run(tiles_NHWC: np.ndarray) -> Answer:
            probabilities, confidence, label_index = session.run(
                list(self.tensors.outputs), {self.tensors.input: tiles_NHWC}
            )
            return Answer(np.asarray(probabilities), np.asarray(confidence), np.asarray(label_index))

        return run


def write_onnx(network: Network) -> bytes:
    """A network as one FP32 ONNX file with a free batch; it passes onnx.checker with full shape inference.

    Raises:
        GraphError: the network cannot be expressed in this opset.
    """
    import onnx

    graph = ServedGraph(network.backbone, network.mean, network.std, channels_last=False).eval()
    # Two example tiles: an example of one can freeze the batch dimension.
    example = torch.zeros((2, network.input_size_px, network.input_size_px, 3), dtype=torch.uint8)
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[Onnx.tensors.input],
                output_names=list(Onnx.tensors.outputs),
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                external_data=False,
                verbose=False,
            )
        if program is None:
            raise GraphError("torch.onnx.export returned nothing. Install the pinned version of torch.")
        model = program.model_proto
        forget_where_it_was_built(model)
        if model.ByteSize() > _PROTOBUF_LIMIT_BYTES:
            raise GraphError(
                f"The ONNX file would have {model.ByteSize()} bytes, more than protobuf's limit of "
                f"{_PROTOBUF_LIMIT_BYTES}. Export this network as torchscript."
            )
        onnx.checker.check_model(model, full_check=True)
    except GraphError:
        raise
    except Exception as error:  # the exporter and the checker raise errors of many libraries
        raise GraphError(
            f"The network cannot be written as ONNX (opset {OPSET}): {first_line(error)}. "
            "Export it as torchscript, or change the architecture."
        ) from error
    if model.ir_version > LATEST_IR_VERSION:
        raise GraphError(
            f"The ONNX file has IR version {model.ir_version}, which older ONNX Runtimes cannot load; "
            f"{LATEST_IR_VERSION} is the latest allowed. Install the pinned versions of torch and onnx."
        )
    return model.SerializeToString()


def forget_where_it_was_built(model: object) -> None:
    """Drop the stack traces with paths of this machine that exporters note at every node of an ONNX model."""
    graph = model.graph  # type: ignore[attr-defined]
    for owner in (
        model,
        graph,
        *graph.node,
        *graph.value_info,
        *graph.input,
        *graph.output,
        *graph.initializer,
    ):
        owner.ClearField("metadata_props")
        owner.ClearField("doc_string")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' chatter on standard output and in the logs."""
    noisy = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in noisy]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in noisy:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(noisy, levels, strict=True):
                logger.setLevel(level)


def first_line(error: BaseException) -> str:
    """Type and first line of an error of a library."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else '(no message)'}"
