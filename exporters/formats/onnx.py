"""ONNX: one file with its weights inside, for Triton's ``onnxruntime`` backend.

Opset 18 and IR version 10 load in ONNX Runtime from 1.18 on, so also in Triton containers whose runtime is older than
the one that exported; `Network.onnx_target` asks for older ones.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from exporters.errors import DamagedArtifactError, GraphError
from exporters.formats.interface import (
    GIVES_WAY,
    TILES_INPUT,
    Artifact,
    Network,
    OnnxTarget,
    Runner,
    ServedFormat,
    answer_of,
)
from exporters.triton_config import OUTPUTS

_PROTOBUF_LIMIT_BYTES = 2**31 - 1
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NOISY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


class Onnx(ServedFormat):
    """See the module."""

    name = "onnx"
    backend = "onnxruntime"
    artifact_filename = "model.onnx"
    # One thread an execution: parallel work comes from instances and batches, which do not wait for each other.
    # A lone execution takes all cores, and a network gives way to what feeds it (embedded backend only; the native one
    # does not look for the names).
    parameters: Mapping[str, str] = MappingProxyType(
        {"intra_op_thread_count": "1", "alone_thread_count": "0", "niceness": GIVES_WAY}
    )

    def build(self, network: Network) -> Artifact:
        """See ServedFormat. The file passes onnx.checker with full shape inference."""
        return Artifact({self.artifact_filename: network.onnx}, onnx_notes(network.onnx_target))

    def open(self, path: Path, outputs: Sequence[str] = OUTPUTS) -> Runner:
        """See ServedFormat."""
        return opened(path, outputs)


def onnx_notes(target: OnnxTarget) -> dict[str, Any]:
    """What the release tells of an ONNX file."""
    return {"onnx": {"opset": target.opset, "ir_version": target.ir_version}}


def opened(path: Path, outputs: Sequence[str], provider: str = "CPUExecutionProvider") -> Runner:
    """An ONNX file in this process with one thread, as it is served.

    Args:
        provider: ONNX Runtime's execution provider; one that does not start is an error and not replaced by the CPU.

    Raises:
        DamagedArtifactError: ONNX Runtime cannot open it, or not with that provider.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # onnxruntime's errors share no root of their own
        raise DamagedArtifactError(f"ONNX Runtime cannot open {path}: {first_line(error)}") from error
    if session.get_providers()[0] != provider:
        raise DamagedArtifactError(
            f"ONNX Runtime cannot open {path} with {provider}, only with {', '.join(session.get_providers())}"
        )
    names = list(outputs)

    def run(tiles_NHWC: np.ndarray) -> Any:
        return answer_of([np.asarray(v) for v in session.run(names, {TILES_INPUT: tiles_NHWC})], outputs)

    return run


def write_onnx(network: Network) -> bytes:
    """A network as one FP32 ONNX file with a free batch; see `write_graph`."""
    side = network.input_size_px
    # Two example tiles: an example of one can freeze the batch dimension.
    example = torch.zeros((2, side, side, 3), dtype=torch.uint8)
    return write_graph(
        network.graph(channels_last=False), {TILES_INPUT: example}, network.outputs, network.onnx_target
    )


def write_graph(
    graph: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    target: OnnxTarget | None = None,
    *,
    free: str | None = "batch",
) -> bytes:
    """A module as one ONNX file with its weights inside; it passes onnx.checker with full shape inference.

    Args:
        graph: in evaluation mode; called with the inputs in their order.
        inputs: name -> example. The first axis of each is free, and has 2 or more entries in the example.
        outputs: names of what the module returns, in its order.
        target: what has to be able to read the file; OnnxTarget() if None.
        free: name of the free axis; None freezes the shapes of the examples.

    Raises:
        GraphError: the module cannot be expressed in this opset, or its file would be too large.
    """
    import onnx

    target = target or OnnxTarget()
    batch = None if free is None else torch.export.Dim(free, min=1)
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=target.opset,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=None if batch is None else tuple({0: batch} for _ in inputs),
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
        require_target(model, target)
        onnx.checker.check_model(model, full_check=True)
    except GraphError:
        raise
    except Exception as error:  # the exporter and the checker raise errors of many libraries
        raise GraphError(
            f"The network cannot be written as ONNX (opset {target.opset}): {first_line(error)}. "
            "Export it as torchscript, or change the architecture."
        ) from error
    return bytes(model.SerializeToString(deterministic=True))


def require_target(model: Any, target: OnnxTarget) -> None:
    """Let an ONNX model say the IR version of its target, whose features are all that it uses.

    Raises:
        GraphError: it is of another opset, or that opset needs a later IR version.
    """
    import onnx

    found = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if found.get("ai.onnx") != target.opset:
        raise GraphError(
            f"The network cannot be written in opset {target.opset}, only in {found.get('ai.onnx')}, the oldest that "
            "PyTorch's exporter gave. Choose a newer container, or export it as torchscript."
        )
    needed = onnx.helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    if needed > target.ir_version:
        raise GraphError(
            f"Opset {target.opset} needs IR version {needed}; {target.ir_version} is the latest that the target reads. "
            "Ask for an older opset."
        )
    model.ir_version = min(model.ir_version, target.ir_version)


def forget_where_it_was_built(model: object) -> None:
    """Drop the stack traces with paths of this machine that exporters note at every node, and domains that no node uses."""
    graph = model.graph  # type: ignore[attr-defined]
    used = {node.domain or "ai.onnx" for node in graph.node} | {"ai.onnx"}
    opsets = model.opset_import  # type: ignore[attr-defined]
    for entry in [entry for entry in opsets if (entry.domain or "ai.onnx") not in used]:
        opsets.remove(entry)
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
    """Type and first line of an error of a library, or of what caused it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = _COLOURS.sub("", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else '(no message)'}"
