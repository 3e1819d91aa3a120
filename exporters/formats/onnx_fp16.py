"""ONNX in FP16, for GPUs: half the size, and tensor cores where there are some.

Weights and layers become FP16; uint8 tiles stay the input, and the last steps (softmax, confidence, label) stay FP32, so
that the answer has the same types as every other format's. Where ONNX Runtime has CUDA, both this and the FP32 that it has to
beat run there. On a CPU ONNX Runtime casts every layer back to FP32: the numbers can be checked, the speed cannot, and
the format stays unproven.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporters.errors import GraphError, PrecisionError
from exporters.formats.interface import Artifact, Network, Runner
from exporters.formats.onnx import (
    Onnx,
    first_line,
    forget_where_it_was_built,
    onnx_notes,
    opened,
    quiet,
)
from exporters.triton_config import OUTPUTS

_CUDA = "CUDAExecutionProvider"
_KEPT_IN_FP32 = ("Softmax", "ReduceMax", "ArgMax")


class OnnxFp16(Onnx):
    """See the module."""

    name = "onnx-fp16"
    precision = "fp16"
    machine = "gpu"
    baseline = "onnx"

    def build(self, network: Network) -> Artifact:
        """See ServedFormat."""
        written, notes = to_fp16(network.onnx)
        return Artifact({self.artifact_filename: written}, {**notes, **onnx_notes(network.onnx_target)})

    def unproven_here(self) -> str | None:
        """See ServedFormat."""
        if _provider() == _CUDA:
            return None
        import onnxruntime

        return (
            "it is meant for a GPU, and this ONNX Runtime has none (providers: "
            f"{', '.join(onnxruntime.get_available_providers())}); export on a GPU machine with onnxruntime-gpu"
        )

    def open(self, path: Path, outputs: Sequence[str] = OUTPUTS) -> Runner:
        """See ServedFormat; with CUDA where ONNX Runtime has it."""
        return opened(path, outputs, _provider())

    def open_baseline(self, path: Path, outputs: Sequence[str] = OUTPUTS) -> Runner:
        """See ServedFormat; FP32 runs where this runs."""
        return opened(path, outputs, _provider())


def _provider() -> str:
    import onnxruntime

    return _CUDA if _CUDA in onnxruntime.get_available_providers() else "CPUExecutionProvider"


def to_fp16(written: bytes) -> tuple[bytes, dict[str, object]]:
    """An FP32 ONNX file in FP16, with its uint8 input and FP32 answer kept; and what was done.

    Raises:
        GraphError: an operator has no FP16 form.
        PrecisionError: layers were left in FP32.
    """
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    try:
        with quiet(), _quiet_converter():
            model = convert_float_to_float16(
                onnx.load_from_string(written),
                keep_io_types=True,
                op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_KEPT_IN_FP32],
            )
            _without_round_trips(model)
            OnnxModel(model).topological_sort()  # the casts are appended at the end
            forget_where_it_was_built(model)
            onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the converter asserts, the checker has errors of its own
        raise GraphError(
            f"The network cannot be written as FP16 ONNX: {first_line(error)}. Export it as onnx."
        ) from error
    sizes = {
        kind: sum(len(tensor.raw_data) for tensor in model.graph.initializer if tensor.data_type == data_type)
        for kind, data_type in (("fp16", onnx.TensorProto.FLOAT16), ("fp32", onnx.TensorProto.FLOAT))
    }
    if sizes["fp32"] > sizes["fp16"]:
        raise PrecisionError(
            f"The FP16 file keeps {sizes['fp32']} bytes of weights in FP32 and has {sizes['fp16']} in FP16: it is not "
            "the precision that was asked for. Export this network as onnx."
        )
    return model.SerializeToString(), {"weight_bytes": sizes}


def _without_round_trips(model: Any) -> None:
    """Between two steps kept in FP32 the converter leaves FP32 -> FP16 -> FP32, which loses the small probabilities."""
    graph = model.graph
    producer = {name: node for node in graph.node for name in node.output}
    answers = {output.name for output in graph.output}
    to_fp32 = [node for node in graph.node if node.op_type == "Cast" and node.input[0] in producer]
    # Those that make an output of the graph first: the name of that output then belongs to the step itself.
    for cast in sorted(to_fp32, key=lambda node: node.output[0] not in answers):
        to_fp16 = producer.get(cast.input[0])
        if to_fp16 is None or to_fp16.op_type != "Cast" or to_fp16.input[0] not in producer:
            continue
        step = producer[to_fp16.input[0]]
        if step.op_type not in _KEPT_IN_FP32:
            continue
        old, new = to_fp16.input[0], cast.output[0]
        graph.node.remove(cast)
        if new in answers:
            step.output[list(step.output).index(old)] = new
            producer[new] = step
            _rename_inputs(graph, old, new)
        else:
            _rename_inputs(graph, new, old)
    while unused := [n for n in graph.node if not _is_used(graph, n) and n.op_type == "Cast"]:
        for node in unused:
            graph.node.remove(node)
    del graph.value_info[:]  # names have changed; they are inferred anew


def _rename_inputs(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new


def _is_used(graph: Any, node: Any) -> bool:
    wanted = {output.name for output in graph.output} | {name for other in graph.node for name in other.input}
    return not wanted.isdisjoint(node.output)


class _quiet_converter:
    """The converter warns once for every weight that is too small for FP16."""

    def __enter__(self) -> None:
        self.logger = logging.getLogger("onnxruntime.transformers.float16")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *exception: object) -> None:
        self.logger.setLevel(self.level)
