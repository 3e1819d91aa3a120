"""Normalisation folded into the first convolution, so that it takes the tile's bytes as they are.

Normalised, a pixel x of channel c is a_c x + b_c, and a convolution of it is one of x - z with weights w a_c and another bias,
for any z. Only the border differs: the convolution pads with zeros after normalisation, which are pixels of the mean colour.
That border is therefore put around the bytes, rounded to whole ones, and the convolution pads no more.

For INT8 the bytes are then the quantised input itself, of scale 1 and zero point z: nothing is lost in quantising it, and four
steps over all pixels (to float, times, plus, to integer) are gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exporters.formats.interface import TILES_INPUT

CENTRED = "tiles_centred"
"""Name of the tensor x - z, FP32."""
_BYTES = "tiles_planes"


def fold_normalisation(model: Any, mean: Sequence[float], std: Sequence[float]) -> int | None:
    """Rewrite an FP32 ONNX graph, as `write_onnx` makes it, in place.

    Args:
        model: tiles -> Transpose -> Cast -> Mul -> Add -> Conv ...
        mean: of RGB in 0..1.
        std: of RGB in 0..1.

    Returns:
        The zero point z; None, and the model as it was, where the graph does not begin so.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    held: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
    chain = _beginning(graph)
    if chain is None or not _can_be_folded(graph, chain[-1], held):
        return None
    *before, conv = chain
    pads = next((list(attribute.ints) for attribute in conv.attribute if attribute.name == "pads"), [0] * 4)
    mean_byte_C = 255.0 * np.asarray(mean, np.float64)
    scale_C = 1.0 / (255.0 * np.asarray(std, np.float64))
    zero_point = int(np.clip(np.round(mean_byte_C.mean()), 1, 255))  # of 0 the subtraction is optimised away
    folded_KCHW = numpy_helper.to_array(held[conv.input[1]]).astype(np.float64) * scale_C[:, None, None]
    bias_K = (folded_KCHW.sum(axis=(2, 3)) * (zero_point - mean_byte_C)).sum(axis=1)
    if len(conv.input) > 2:
        bias_K = bias_K + numpy_helper.to_array(held[conv.input[2]])
    names = [conv.input[1], conv.input[2] if len(conv.input) > 2 else f"{conv.input[1]}_bias"]
    for name, values in zip(names, (folded_KCHW, bias_K), strict=True):
        if name in held:
            graph.initializer.remove(held[name])
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    colour_C = np.clip(np.round(mean_byte_C), 0, 255).astype(np.uint8)
    bordered, nodes = _border(graph, pads, colour_C)
    graph.initializer.append(numpy_helper.from_array(np.array(zero_point, np.float32), "tiles_centre"))
    nodes += [
        helper.make_node("Transpose", [bordered], [_BYTES], name="tiles_transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Cast", [_BYTES], ["tiles_float"], name="tiles_cast", to=1),
        helper.make_node("Sub", ["tiles_float", "tiles_centre"], [CENTRED], name="tiles_centring"),
    ]
    conv.input[:] = [CENTRED, *names]
    for attribute in conv.attribute:
        if attribute.name == "pads":
            attribute.ints[:] = [0, 0, 0, 0]
    _replace_nodes(graph, [*nodes, *(node for node in graph.node if not any(node is one for one in before))])
    return zero_point


def quantise_bytes(model: Any) -> None:
    """Let the dequantised input of a quantised graph begin with the bytes, in place of bytes made float and quantised."""
    graph = model.graph
    (quantise,) = (
        node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == CENTRED
    )
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == quantise.output[0]:
                node.input[place] = _BYTES
    gone = {"tiles_cast", "tiles_centring", quantise.name}
    _replace_nodes(graph, [node for node in graph.node if node.name not in gone])


def _replace_nodes(graph: Any, nodes: list[Any]) -> None:
    """Other nodes, without the constants that none of them reads; shapes are inferred anew."""
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    del graph.value_info[:]


def _can_be_folded(graph: Any, conv: Any, held: Mapping[str, Any]) -> bool:
    """One group, pads that are numbers, and weights that are constants of its own."""
    from onnx import helper

    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in conv.attribute}
    readers = Counter(name for node in graph.node for name in node.input)
    return (
        all(name in held and readers[name] == 1 for name in conv.input[1:])
        and attributes.get("group", 1) == 1
        and attributes.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
        and len(attributes.get("pads", [0] * 4)) == 4
    )


def _beginning(graph: Any) -> list[Any] | None:
    """The first nodes up to the convolution, if they are what `write_onnx` writes and nothing else reads between them."""
    chain: list[Any] = []
    tensor = TILES_INPUT
    for wanted in ("Transpose", "Cast", "Mul", "Add", "Conv"):
        readers = [node for node in graph.node if tensor in node.input]
        if len(readers) != 1 or readers[0].op_type != wanted or readers[0].input[0] != tensor:
            return None
        chain.append(readers[0])
        tensor = readers[0].output[0]
    return chain


def _border(graph: Any, pads: Sequence[int], colour_C: np.ndarray) -> tuple[str, list[Any]]:
    """Nodes that put a border of one colour around tiles [N, H, W, 3], and the name of what they give."""
    from onnx import helper, numpy_helper

    if not any(pads):
        return TILES_INPUT, []
    top, left, bottom, right = pads
    height, width = (entry.dim_value for entry in graph.input[0].type.tensor_type.shape.dim[1:3])
    nodes = [
        helper.make_node("Shape", [TILES_INPUT], ["tiles_count"], name="tiles_count", start=0, end=1),
    ]

    def add(name: str, values: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    add("border_ones", np.ones(3, np.int64))
    nodes.append(
        helper.make_node(
            "Concat", ["tiles_count", "border_ones"], ["border_shape"], name="border_shape", axis=0
        )
    )

    def strip(name: str, high: int, wide: int) -> str:
        values = np.broadcast_to(colour_C, (1, high, wide, 3))
        add(f"{name}_one", np.ascontiguousarray(values))
        nodes.append(helper.make_node("Expand", [f"{name}_one", "border_shape"], [name], name=name))
        return name

    middle = [
        *([strip("border_left", height, left)] if left else []),
        TILES_INPUT,
        *([strip("border_right", height, right)] if right else []),
    ]
    nodes.append(helper.make_node("Concat", middle, ["tiles_wide"], name="tiles_wide", axis=2))
    rows = [
        *([strip("border_top", top, left + width + right)] if top else []),
        "tiles_wide",
        *([strip("border_bottom", bottom, left + width + right)] if bottom else []),
    ]
    nodes.append(helper.make_node("Concat", rows, ["tiles_bordered"], name="tiles_bordered", axis=1))
    return "tiles_bordered", nodes
