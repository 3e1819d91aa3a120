"""The head graph: embeddings of a slide's tiles in, the slide's answer out, as one ONNX file with its weights inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.compose
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from exporters.errors import DamagedArtifactError, GraphError
from exporters.formats.interface import OnnxTarget
from exporters.formats.onnx import first_line, require_target, write_graph
from exporters.slide.combination import MEMBERS, OUTPUTS, combination_nodes
from training.ensembles.definition import Ensemble

ATTENTION = "attention"
HEAD_OUTPUTS = (*OUTPUTS[:3], ATTENTION, *OUTPUTS[3:], MEMBERS)
"""What a head answers, see `combination.OUTPUTS`; attention FP32 [T] sums to 1, member_probabilities FP32 [M, K]."""

HeadRunner = Callable[[Sequence[np.ndarray]], Mapping[str, np.ndarray]]
"""Runs a head in this process: the members' embeddings, FP32 [T, D] each -> HEAD_OUTPUTS by name."""


def embedding_names(members: int) -> tuple[str, ...]:
    """Names of a head's inputs: `embeddings`, or with several members `embeddings_<m>`."""
    return ("embeddings",) if members == 1 else tuple(f"embeddings_{m}" for m in range(members))


class MeanHead(nn.Module):
    """Every tile counts the same: probabilities FP32 [T, K] -> their mean [K], and attention 1/T [T]."""

    def forward(self, probabilities_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ones_T = torch.ones_like(probabilities_TK[:, 0])
        return probabilities_TK.double().mean(dim=0).float(), ones_T / ones_T.sum()


@dataclass(frozen=True)
class MemberHead:
    """What one member makes of its embeddings.

    Attributes:
        module: FP32 [T, D] -> probabilities [K] in the member's own order of classes, attention [T].
        embedding_dim: D.
        order_K: for each class of the ensemble, where it stands among the member's own.
    """

    module: nn.Module
    embedding_dim: int
    order_K: tuple[int, ...]


def head_onnx(members: Sequence[MemberHead], ensemble: Ensemble, target: OnnxTarget | None = None) -> bytes:
    """The heads of all members and their combination as one ONNX file.

    The attention of several members is the mean of theirs, weighted as their votes are.

    Args:
        members: those of the ensemble, in its order.

    Raises:
        GraphError: a head cannot be written as ONNX.
    """
    target = target or OnnxTarget()
    names = embedding_names(len(members))
    parts = [
        _part(member, f"member_{m}/", name, target)
        for m, (member, name) in enumerate(zip(members, names, strict=True))
    ]
    joining, constants = _joining(members, ensemble)
    nodes, initializers, outputs = combination_nodes(ensemble)
    shapes: dict[str, list[str | int]] = {
        ATTENTION: ["tiles"],
        MEMBERS: [len(members), len(ensemble.class_names)],
    }
    of_name = {output.name: output for output in outputs}
    of_name |= {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()
    }
    graph = helper.make_graph(
        [*(node for part in parts for node in part.graph.node), *joining, *nodes],
        "slide_head",
        [entry for part in parts for entry in part.graph.input],
        [of_name[name] for name in HEAD_OUTPUTS],
        initializer=[
            *(entry for part in parts for entry in part.graph.initializer),
            *constants,
            *initializers,
        ],
    )
    model = helper.make_model(graph, opset_imports=parts[0].opset_import, ir_version=target.ir_version)
    try:
        require_target(model, target)
        onnx.checker.check_model(model, full_check=True)
    except GraphError:
        raise
    except Exception as error:  # the checker raises errors of its own and of protobuf
        raise GraphError(f"The slide head cannot be written as ONNX: {first_line(error)}.") from error
    return bytes(model.SerializeToString(deterministic=True))


def _part(member: MemberHead, prefix: str, input_name: str, target: OnnxTarget) -> onnx.ModelProto:
    """One member's head; all its names begin with `prefix`, but for its input."""
    written = write_graph(
        member.module.eval(),
        {"embeddings": torch.zeros(3, member.embedding_dim)},
        (MEMBERS, ATTENTION),
        target,
        free="tiles",
    )
    model = onnx.compose.add_prefix(onnx.load_from_string(written), prefix)
    for node in model.graph.node:
        node.input[:] = [input_name if name == f"{prefix}embeddings" else name for name in node.input]
    model.graph.input[0].name = input_name
    return model


def _joining(
    members: Sequence[MemberHead], ensemble: Ensemble
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes that bring the members' answers into the order of the ensemble, and into one array each."""
    constants = [numpy_helper.from_array(np.array([0]), "join/first_axis")]
    nodes, rows, attentions = [], [], []
    for m, (member, weight) in enumerate(zip(members, ensemble.combination.weights_M, strict=True)):
        constants += [
            numpy_helper.from_array(np.array(member.order_K), f"join/order_{m}"),
            numpy_helper.from_array(np.array([weight], np.float32), f"join/weight_{m}"),
        ]
        ordered, row, attention = (f"join/{what}_{m}" for what in ("ordered", "row", "attention"))
        nodes += [
            helper.make_node("Gather", [f"member_{m}/{MEMBERS}", f"join/order_{m}"], [ordered], axis=0),
            helper.make_node("Unsqueeze", [ordered, "join/first_axis"], [row]),
            helper.make_node("Mul", [f"member_{m}/{ATTENTION}", f"join/weight_{m}"], [attention]),
        ]
        rows.append(row)
        attentions.append(attention)
    nodes += [
        helper.make_node("Concat", rows, [MEMBERS], axis=0),
        helper.make_node("Sum", attentions, [ATTENTION]),
    ]
    return nodes, constants


def open_head(content: bytes) -> HeadRunner:
    """Open a head in this process.

    Raises:
        DamagedArtifactError: ONNX Runtime cannot open it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no root of their own
        raise DamagedArtifactError(f"ONNX Runtime cannot open the slide head: {first_line(error)}") from error
    names = [entry.name for entry in session.get_inputs()]

    def run(embeddings: Sequence[np.ndarray]) -> Mapping[str, np.ndarray]:
        feed = {name: np.ascontiguousarray(part) for name, part in zip(names, embeddings, strict=True)}
        return dict(zip(HEAD_OUTPUTS, session.run(list(HEAD_OUTPUTS), feed), strict=True))

    return run
