"""The combination of an ensemble as ONNX nodes: what `training.ensembles` computes in NumPy, with the weights inside.

Everything is computed in FP64, as the reference does, from the members' FP32 probabilities: logarithms of small
probabilities times the coefficients of a meta-learner would lose digits in FP32, and the graph is tiny.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from exporters.formats.interface import OnnxTarget
from exporters.formats.onnx import require_target
from training.calibration import SMALLEST_PROBABILITY
from training.ensembles import conformal
from training.ensembles.definition import Ensemble

MEMBERS = "member_probabilities"
"""Name of the input: FP32 [M, K], classes in the order of the ensemble."""

OUTPUTS = (
    "probabilities",
    "confidence",
    "label_index",
    "entropy",
    "mutual_information",
    "std",
    "answered",
)
"""FP32 [K], FP32 [1], INT64 [1], FP32 [1] (nats), FP32 [1] (nats), FP32 [1], BOOL [1]; see `training.ensembles`."""

_SMALLEST_FP64 = 1e-300
_PREFIX = "combination/"


def combination_nodes(
    ensemble: Ensemble,
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], list[onnx.ValueInfoProto]]:
    """Nodes from MEMBERS to OUTPUTS, their initialisers, and the outputs."""
    graph = _Nodes()
    members_MK = graph.node("Cast", [MEMBERS], to=TensorProto.DOUBLE)
    weights_M = graph.constant("weights", ensemble.combination.weights_M)
    mean_K = graph.node("MatMul", [weights_M, members_MK])
    answer_K = _tempered(graph, _joined(graph, ensemble, members_MK, weights_M, mean_K), ensemble)
    graph.node("Cast", [answer_K], to=TensorProto.FLOAT, output="probabilities")
    graph.node(
        "ReduceMax", ["probabilities", graph.constant("axis", np.array([0]))], keepdims=1, output="confidence"
    )
    graph.node("ArgMax", [answer_K], axis=0, keepdims=1, output="label_index")
    graph.fp32(_entropy(graph, answer_K), "entropy")
    gained = graph.node(
        "Sub",
        [
            _entropy(graph, mean_K),
            graph.node("MatMul", [weights_M, _entropy(graph, members_MK, of_rows=True)]),
        ],
    )
    graph.fp32(graph.node("Max", [gained, graph.constant("nothing", np.zeros(1))]), "mutual_information")
    graph.fp32(_deviation(graph, members_MK, weights_M, mean_K), "std")
    _answered(graph, ensemble, answer_K)
    classes = len(ensemble.class_names)
    types = {"label_index": TensorProto.INT64, "answered": TensorProto.BOOL}
    outputs = [
        helper.make_tensor_value_info(
            name, types.get(name, TensorProto.FLOAT), [classes if name == "probabilities" else 1]
        )
        for name in OUTPUTS
    ]
    return graph.nodes, graph.initializers, outputs


def combination_onnx(ensemble: Ensemble, target: OnnxTarget | None = None) -> bytes:
    """The combination as an ONNX file of its own: MEMBERS FP32 [M, K] -> OUTPUTS."""
    target = target or OnnxTarget()
    nodes, initializers, outputs = combination_nodes(ensemble)
    shape = [len(ensemble.members), len(ensemble.class_names)]
    members = helper.make_tensor_value_info(MEMBERS, TensorProto.FLOAT, shape)
    model = helper.make_model(
        helper.make_graph(nodes, "combination", [members], outputs, initializer=initializers),
        opset_imports=[helper.make_opsetid("", target.opset)],
        ir_version=target.ir_version,
    )
    require_target(model, target)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


class _Nodes:
    """A growing list of nodes; names are numbered, so that the same ensemble gives the same bytes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def node(
        self, operator: str, inputs: Sequence[str], *, output: str | None = None, **attributes: Any
    ) -> str:
        name = f"{_PREFIX}{len(self.nodes)}_{operator}"
        output = output or name
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=name, **attributes))
        return output

    def constant(self, what: str, values: np.ndarray) -> str:
        name = f"{_PREFIX}{what}"
        if all(entry.name != name for entry in self.initializers):
            self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def fp32(self, value: str, output: str) -> None:
        self.node("Cast", [value], to=TensorProto.FLOAT, output=output)


def _joined(graph: _Nodes, ensemble: Ensemble, members_MK: str, weights_M: str, mean_K: str) -> str:
    """The ensemble's answer [K] before its temperature."""
    join = ensemble.combination
    if join.meta is not None:
        logs_MK = _log(graph, members_MK)
        axis = graph.constant("last_axis", np.array([1]))
        centred_MK = graph.node("Sub", [logs_MK, graph.node("ReduceMean", [logs_MK, axis], keepdims=1)])
        flat = graph.node("Reshape", [centred_MK, graph.constant("flat", np.array([-1]))])
        coefficients = graph.constant("coefficients", join.meta.coefficients_KF)
        logits_K = graph.node(
            "Add",
            [graph.node("MatMul", [coefficients, flat]), graph.constant("intercept", join.meta.intercept_K)],
        )
        return graph.node("Softmax", [logits_K], axis=0)
    if join.method == "hard":
        preferred_M1 = graph.node("ArgMax", [members_MK], axis=1, keepdims=1)  # the first of equals
        classes_1K = graph.constant("classes", np.arange(len(ensemble.class_names))[None])
        votes_MK = graph.node(
            "Cast", [graph.node("Equal", [preferred_M1, classes_1K])], to=TensorProto.DOUBLE
        )
        return graph.node("MatMul", [weights_M, votes_MK])
    return mean_K


def _tempered(graph: _Nodes, answer_K: str, ensemble: Ensemble) -> str:
    if ensemble.combination.temperature == 1.0:
        return answer_K
    temperature = graph.constant("temperature", np.array([ensemble.combination.temperature]))
    return graph.node("Softmax", [graph.node("Div", [_log(graph, answer_K), temperature])], axis=0)


def _log(graph: _Nodes, values: str) -> str:
    smallest = graph.constant("smallest_probability", np.array([SMALLEST_PROBABILITY]))
    return graph.node("Log", [graph.node("Max", [values, smallest])])


def _entropy(graph: _Nodes, values: str, *, of_rows: bool = False) -> str:
    """- sum p ln p over the last axis, 0 where p is 0: [1], or of rows [M]."""
    smallest = graph.constant("smallest_fp64", np.array([_SMALLEST_FP64]))
    logs = graph.node("Log", [graph.node("Max", [values, smallest])])
    axis = graph.constant("last_axis" if of_rows else "axis", np.array([1 if of_rows else 0]))
    total = graph.node("ReduceSum", [graph.node("Mul", [values, logs]), axis], keepdims=0 if of_rows else 1)
    return graph.node("Neg", [total])


def _deviation(graph: _Nodes, members_MK: str, weights_M: str, mean_K: str) -> str:
    """Weighted standard deviation between members of the probability of the class that their mean prefers, [1]."""
    preferred = graph.node("ArgMax", [mean_K], axis=0, keepdims=1)
    values_M1 = graph.node("Gather", [members_MK, preferred], axis=1)
    apart_M1 = graph.node("Sub", [values_M1, graph.node("MatMul", [weights_M, values_M1])])
    variance = graph.node("MatMul", [weights_M, graph.node("Mul", [apart_M1, apart_M1])])
    return graph.node("Sqrt", [variance])


def _answered(graph: _Nodes, ensemble: Ensemble, answer_K: str) -> None:
    """Whether exactly one class has 1 - p <= threshold; always, without abstention."""
    if ensemble.abstention is None:
        graph.node("Identity", [graph.constant("always", np.array([True]))], output="answered")
        return
    limit = graph.constant("limit", np.array([ensemble.abstention.threshold + conformal.SLACK]))
    missed_K = graph.node("Sub", [graph.constant("one", np.ones(1)), answer_K])
    inside_K = graph.node("Cast", [graph.node("LessOrEqual", [missed_K, limit])], to=TensorProto.INT64)
    axis = graph.constant("axis", np.array([0]))
    count = graph.node("ReduceSum", [inside_K, axis], keepdims=1)
    graph.node("Equal", [count, graph.constant("exactly_one", np.array([1]))], output="answered")
