"""Normalisation of the bytes as they arrive, for OpenVINO on a CPU.

A tile arrives with its three colours interleaved, and so do OpenVINO's convolutions want it. The graph that is served makes
planes, normalises those, and OpenVINO interleaves again what are floats by then: a hundredth of the time of ResNet-18, and more
of a smaller network's. Here rows of interleaved pixels are normalised, and the planes made just before the convolution: where
sizes are known, OpenVINO finds the two transposes next to each other and drops both (`MergeTransposeAndReorder` of its CPU
plugin, src/plugins/intel_cpu/src/graph_optimizer.cpp). Rows, because a constant of three numbers along the fastest axis is a slow one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_TO_PLANES = (0, 3, 1, 2)
_BY_PIXEL = ("Convert", "Multiply", "Add", "Subtract", "FakeQuantize")


def normalise_rows(model: Any) -> int:
    """Rewrite an `openvino.Model` that takes tiles uint8 [N, S, S, 3] in place; its answers stay the same.

    Returns how many operations work on rows now: 0, and the model as it was, where it does not begin with a transpose to
    planes and operations on single pixels.
    """
    from openvino import opset13 as op

    if len(model.inputs) != 1:
        return 0
    tiles = model.inputs[0]
    shape = tiles.get_partial_shape()
    transpose = _only_user(tiles)
    if transpose is None or not _makes_planes(transpose) or any(shape[axis].is_dynamic for axis in (1, 2, 3)):
        return 0
    height, width, colours = (shape[axis].get_length() for axis in (1, 2, 3))
    chain = _chain(transpose, colours)
    if not chain:
        return 0
    users = list(chain[-1].output(0).get_target_inputs())
    previous = op.reshape(tiles, np.array([0, 0, width * colours]), special_zero=True)
    for node in chain:
        for place in range(node.get_input_size()):
            source = node.input_value(place).get_node()
            if place > 0 and source.get_type_name() == "Constant":
                values = source.get_data().reshape(-1)
                row = np.tile(values, width).reshape(1, 1, -1) if values.size > 1 else values.reshape(())
                node.input(place).replace_source_output(op.constant(row).output(0))
        node.input(0).replace_source_output(previous.output(0))
        previous = node
    pixels = op.reshape(previous, np.array([0, height, width, colours]), special_zero=True)
    planes = op.transpose(pixels, np.array(_TO_PLANES))
    for user in users:
        user.replace_source_output(planes.output(0))
    model.validate_nodes_and_infer_types()
    return len(chain)


def _only_user(output: Any) -> Any | None:
    """The one operation that takes this tensor, as its first input."""
    users = list(output.get_target_inputs())
    return users[0].get_node() if len(users) == 1 and users[0].get_index() == 0 else None


def _makes_planes(node: Any) -> bool:
    if node.get_type_name() != "Transpose":
        return False
    order = node.input_value(1).get_node()
    return order.get_type_name() == "Constant" and tuple(order.get_data()) == _TO_PLANES


def _chain(transpose: Any, colours: int) -> list[Any]:
    """The operations after it whose result at a pixel needs that pixel and its colour alone."""
    found: list[Any] = []
    node = _only_user(transpose.output(0))
    while node is not None and node.get_type_name() in _BY_PIXEL and _moves(node, colours):
        found.append(node)
        node = _only_user(node.output(0))
    return found


def _moves(node: Any, colours: int) -> bool:
    """Whether its other operands are one number, or constants with one for each colour."""
    for place in range(1, node.get_input_size()):
        source = node.input_value(place)
        if not source.get_partial_shape().is_static:
            return False
        shape = list(source.get_shape())
        constant = source.get_node().get_type_name() == "Constant"
        number = math.prod(shape) == 1 and (constant or not shape)
        of_colours = constant and shape[-3:] == [colours, 1, 1] and math.prod(shape) == colours
        if not number and not of_colours:
            return False
    return True
