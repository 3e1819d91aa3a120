"""Which layer of an INT8 network went wrong: signal to noise of every layer against FP32, in order of execution.

Both graphs answer the same tiles with all their intermediate results, optimisation off, as `onnxruntime.quantization.
qdq_loss_debug` does it. Three things are done otherwise. Tiles go through a few at a time and only sums are kept: all
activations of a large network take gigabytes. Signal is how much a result varies from tile to tile, as in
`exporters.tolerances`; what all tiles have in common tells nothing apart. And what a layer adds is told from what it was
given: errors are handed on, every layer behind a broken one is bad, and the broken one is where the ratio falls below
that of its own inputs.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporters.errors import GraphError

_BATCH = 4
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_ANSWER = ("Softmax", "ReduceMax", "ArgMax")
_NAMED = 5
_LARGEST_DB = 60.0  # rounding to 8 bits alone gives about 48; what is better is drawn here
_NAMED_SHARE = 0.05
_STANDS_OUT_SHARE = 0.4
_WRAP = 112
_INT8_COLOUR, _FP32_COLOUR = "#D55E00", "#0072B2"


@dataclass(frozen=True)
class LayerError:
    """How far a layer of the INT8 network is from the same layer in FP32.

    Attributes:
        name: of its weights, as in the network ("layer1.0.conv1"), otherwise of its result and the layer before.
        operator: ONNX operator, such as "Conv".
        snr_db: 10 log10(variance of FP32's result over the tiles / mean squared difference), with everything that earlier
            layers did wrong; infinite where they are equal.
        fall_db: by how much that is below the worst of its inputs; negative where the layer makes errors smaller.
        from_int8: whether its result is rounded to 8 bits.
    """

    name: str
    operator: str
    snr_db: float
    fall_db: float
    from_int8: bool


def layer_errors(fp32: bytes, int8: bytes, tiles_NHWC: np.ndarray) -> list[LayerError]:
    """Every layer that both graphs have, in order of execution.

    Args:
        fp32: the network as `onnx` writes it.
        int8: the same as `onnx-int8` writes it: results keep their names, Q/DQ pairs stand between them.
        tiles_NHWC: uint8 [N, S, S, 3] RGB; 16 are plenty.

    Raises:
        GraphError: a file cannot be opened, or they have no layer in common.
    """
    import onnx

    try:
        ours, theirs = onnx.load_from_string(fp32), onnx.load_from_string(int8)
    except Exception as error:  # protobuf's DecodeError
        raise GraphError(f"Not an ONNX file: {error}") from error
    floats = {name for node in ours.graph.node for name in node.output}
    rounded = _rounded(theirs)
    answers = {output.name for output in theirs.graph.output}
    steps = [
        (node, node.output[0])
        for node in theirs.graph.node
        if node.op_type not in _QDQ
        and node.output[0] in floats
        and not (node.op_type in _ANSWER and node.output[0] in answers)  # the last layer gives the logits
    ]
    read_from = {result: rounded.get(result, result) for _, result in steps}
    ratios = _ratios(ours, theirs, read_from, tiles_NHWC) if steps else {}
    if not ratios:
        raise GraphError("The two ONNX files have no layer in common; are they of the same network?")
    layer_names = _layer_names(theirs)
    restored = {value: name for name, value in rounded.items()}
    errors: list[LayerError] = []
    weighted = ""
    for node, result in steps:
        if result not in ratios:  # integers, and what does not depend on the tile
            continue
        given = [ratios[name] for name in (restored.get(i, i) for i in node.input) if name in ratios]
        before = min(given, default=_LARGEST_DB)
        fall_db = min(before, _LARGEST_DB) - min(ratios[result], _LARGEST_DB)
        weighted = layer_names.get(result, weighted)
        name = weighted if result in layer_names else f"{result} after {weighted}" if weighted else result
        errors.append(LayerError(name, node.op_type, ratios[result], fall_db, result in rounded))
    return errors


def broken_layers(errors: Sequence[LayerError]) -> list[LayerError]:
    """The layers that add most noise of their own, worst first: at most five, each a twentieth of it all or more."""
    least = _NAMED_SHARE * sum(max(added_noise(error), 0.0) for error in errors)
    suspects = [error for error in errors if added_noise(error) > 0 and added_noise(error) >= least]
    return sorted(suspects, key=added_noise, reverse=True)[:_NAMED]


def added_noise(error: LayerError) -> float:
    """What a layer adds to the noise, as a share of its signal: from 60 dB to 40 is little, the same fall at 20 is the end.

    Where the signal is gone (0 dB), nothing more can be lost.
    """
    return _noise(error.snr_db) - _noise(error.snr_db + error.fall_db)


def _noise(snr_db: float) -> float:
    return float(min(1.0, 10 ** (-snr_db / 10)))


def layers_plot(errors: Sequence[LayerError], *, title: str) -> bytes:
    """The picture, as PNG: the signal-to-noise of every layer from left to right, the worst ones named.

    Raises:
        ValueError: no layers.
    """
    if not errors:
        raise ValueError("no layers to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [max(min(error.snr_db, _LARGEST_DB), -20.0) for error in errors]
    places = range(1, len(errors) + 1)
    words = _names(errors)
    height_in = 5.05 + 0.175 * len(words)
    figure = Figure(figsize=(9.6, height_in), dpi=110)
    FigureCanvasAgg(figure)
    bottom = (0.62 + 0.175 * len(words)) / height_in
    axes = figure.add_axes((0.08, bottom, 0.9, 1 - bottom - 0.92 / height_in))
    figure.text(0.012, 1 - 0.13 / height_in, title, fontsize=13, weight="bold", va="top")
    figure.text(
        0.012,
        1 - 0.45 / height_in,
        textwrap.fill(_verdict(errors), _WRAP),
        fontsize=9.5,
        va="top",
        color="#333333",
    )
    figure.text(0.012, 0.07 / height_in, "\n".join(words), fontsize=8.5, linespacing=1.4)
    axes.plot(places, heights, color="#999999", linewidth=1, zorder=2)
    for label, marker, colour, wanted in (
        ("result in 8 bits", "^", _INT8_COLOUR, True),
        ("result left in FP32", "o", _FP32_COLOUR, False),
    ):
        chosen = [
            (x, y) for x, y, error in zip(places, heights, errors, strict=True) if error.from_int8 is wanted
        ]
        if chosen:
            axes.scatter([x for x, _ in chosen], [y for _, y in chosen], marker=marker, color=colour, s=26,
                         label=label, zorder=3)  # fmt: skip
    axes.axhspan(-40, 12, color="#000000", alpha=0.06, zorder=0)
    axes.annotate("below 12 dB: error more than a quarter of the spread", (0.006, 12),
                  xycoords=("axes fraction", "data"), xytext=(0, -3), textcoords="offset points", va="top",
                  fontsize=8.5, color="#555555")  # fmt: skip
    axes.set_ylim(min(min(heights) - 5, -2), _LARGEST_DB + 3)
    axes.set_yticks(range(-20 if min(heights) < -5 else 0, 61, 10))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < _LARGEST_DB else f"≥ {value:g}")
    axes.set_xlim(0, len(errors) + 1)
    for number, error in enumerate(broken_layers(errors), start=1):
        at = errors.index(error)
        axes.annotate(str(number), (at + 1, heights[at]), xytext=(0, 9), textcoords="offset points", ha="center",
                      fontsize=9, weight="bold", zorder=5,
                      bbox={"boxstyle": "circle,pad=0.18", "facecolor": "white", "edgecolor": "black"})  # fmt: skip
    axes.set_ylabel("signal (spread over tiles) to noise, dB")
    axes.set_xlabel("layer, in order of execution")
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9, ncols=2)
    written = io.BytesIO()
    figure.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()


def _verdict(errors: Sequence[LayerError]) -> str:
    answer = f"The last layer is at {errors[-1].snr_db:.1f} dB."
    worst = broken_layers(errors)
    share = added_noise(worst[0]) / sum(max(added_noise(error), 0.0) for error in errors) if worst else 0.0
    if share < _STANDS_OUT_SHARE:
        return f"{answer} No single layer stands out: the error grows from layer to layer."
    return (
        f"{answer} {worst[0].name} ({worst[0].operator}) stands out: it adds {share:.0%} of the noise that layers add, "
        f"and is {worst[0].fall_db:.0f} dB below its inputs."
    )


def _names(errors: Sequence[LayerError]) -> list[str]:
    """Which layer each number is."""
    return [
        f"{number}  {error.name} ({error.operator}): {error.snr_db:.1f} dB, {error.fall_db:.1f} dB below its inputs"
        for number, error in enumerate(broken_layers(errors), start=1)
    ]


def _rounded(model: Any) -> dict[str, str]:
    """Results that are rounded to 8 bits -> the name under which a DequantizeLinear hands them on."""
    quantised = {
        node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"
    }
    found: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in quantised:
            found.setdefault(quantised[node.input[0]], node.output[0])
    return found


def _layer_names(model: Any) -> dict[str, str]:
    """Result -> name of the layer's weights, without what exporter and quantiser put around it."""
    stored = {
        node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"
    }
    names = {}
    for node in model.graph.node:
        if node.op_type in _QDQ:
            continue
        read = (stored.get(name, name).removesuffix("_quantized") for name in node.input)
        own = next((name for name in read if name.endswith(".weight")), None)
        if own is not None:
            names[node.output[0]] = own.removeprefix("backbone.").removesuffix(".weight")
    return names


def _ratios(ours: Any, theirs: Any, read_from: Mapping[str, str], tiles_NHWC: np.ndarray) -> dict[str, float]:
    """Result -> signal to noise over all tiles, dB."""
    tiles = len(tiles_NHWC)
    sums: dict[str, np.ndarray] = {}
    squares: dict[str, float] = {}
    noise: dict[str, float] = {}
    runs = zip(
        _results(ours, list(read_from), tiles_NHWC),
        _results(theirs, list(read_from.values()), tiles_NHWC),
        strict=True,
    )
    for at, (wanted, found) in enumerate(runs):
        batch = min(_BATCH, tiles - at * _BATCH)
        for name, other in read_from.items():
            truth, value = wanted[name], found[other]
            if truth.dtype.kind != "f" or truth.shape != value.shape or truth.shape[:1] != (batch,):
                continue  # integers, and what is no result of each tile
            sums[name] = sums.get(name, 0.0) + truth.sum(axis=0, dtype=np.float64)
            squares[name] = squares.get(name, 0.0) + float(np.square(truth, dtype=np.float64).sum())
            noise[name] = noise.get(name, 0.0) + float(np.square(truth - value, dtype=np.float64).sum())
    ratios = {}
    for name, total in sums.items():
        signal = squares[name] - float(np.square(total).sum()) / tiles
        ratios[name] = math.inf if noise[name] == 0 else 10 * math.log10(max(signal, 1e-30) / noise[name])
    return ratios


def _results(model: Any, names: Sequence[str], tiles_NHWC: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Intermediate results of a few tiles at a time."""
    import onnx
    import onnxruntime

    known = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        for at in range(0, len(tiles_NHWC), _BATCH):
            values = session.run(names, {session.get_inputs()[0].name: tiles_NHWC[at : at + _BATCH]})
            yield dict(zip(names, values, strict=True))
    except Exception as error:  # onnxruntime's errors share no root of their own
        raise GraphError(f"ONNX Runtime cannot run the graph layer by layer: {error}") from error
