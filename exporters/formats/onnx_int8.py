"""ONNX in INT8, for CPUs: ONNX Runtime's static quantisation with QuantizeLinear/DequantizeLinear pairs (QDQ).

Weights are INT8 with a scale a channel, activations UINT8 with ranges that are calibrated on tiles the network was
trained on. Several methods of finding the ranges are tried; the one whose answers are closest to FP32 on calibration
tiles that it has not seen is kept. Held-out tiles take no part in it: they judge the result in the parity gate.

Normalisation is folded into the first convolution where there is one, which then takes the tile's bytes as they are
(`exporters.formats.folded_normalisation`): on a small network it costs an eighth of the time otherwise.

Where the CPU has no VNNI instructions, a pair of 8-bit products can saturate 16 bits: weights are then given 7 bits
(`reduce_range`; https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from exporters.errors import FormatError, GraphError
from exporters.formats.folded_normalisation import CENTRED, fold_normalisation, quantise_bytes
from exporters.formats.interface import TILES_INPUT, Artifact, Network, OnnxTarget
from exporters.formats.onnx import (
    Onnx,
    first_line,
    forget_where_it_was_built,
    onnx_notes,
    quiet,
    require_target,
)
from exporters.triton_config import OUTPUTS

METHODS = ("MinMax", "Entropy", "Percentile")
"""Of onnxruntime.quantization.CalibrationMethod."""
QUANTISED_OPERATORS = ("Conv", "MatMul", "Gemm", "Add", "Relu", "MaxPool", "GlobalAveragePool", "ReduceMean")
CHOICE_EVERY = 4
"""Every fourth calibration tile is kept for the choice between methods."""
_TILES_A_STRIDE = 8
_VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"})


class OnnxInt8(Onnx):
    """See the module."""

    name = "onnx-int8"
    precision = "int8"
    machine = "cpu"
    baseline = "onnx"
    calibrated = True

    def build(self, network: Network) -> Artifact:
        """See ServedFormat; raises FormatError where there are no calibration tiles."""
        written, notes = quantise(network, fold=True)
        return Artifact({self.artifact_filename: written}, {**notes, **onnx_notes(network.onnx_target)})


def quantise(
    network: Network, *, symmetric: bool = False, fold: bool = False
) -> tuple[bytes, dict[str, Any]]:
    """The network as INT8 ONNX, and how its ranges were found.

    Args:
        network: with calibration tiles.
        fold: fold normalisation into the first convolution where that can be done. ONNX Runtime gains by it; OpenVINO, which
            fuses normalisation itself, loses.
        symmetric: INT8 activations around zero, all that TensorRT knows, and no 32-bit biases.

    Raises:
        FormatError: no calibration tiles.
        GraphError: ONNX Runtime cannot quantise the network.
    """
    tiles_NHWC = network.calibration_NHWC
    if tiles_NHWC is None or len(tiles_NHWC) < 2 * CHOICE_EVERY:
        raise FormatError(
            f"INT8 needs at least {2 * CHOICE_EVERY} calibration tiles; give tiles of the training data with "
            "--calibration-tiles."
        )
    for_choice = np.arange(len(tiles_NHWC)) % CHOICE_EVERY == CHOICE_EVERY - 1
    reduce_range = not symmetric and not has_vnni()
    tried: dict[str, float] = {}
    best: tuple[float, str, bytes] | None = None
    with tempfile.TemporaryDirectory(prefix="clotline-int8-") as scratch:
        try:
            with quiet(), _quiet_quantiser():
                source, zero_point = _folded(network) if fold else (network.onnx, None)
                prepared = _prepared(source, Path(scratch))
                wanted_NK = _answers(network.onnx, tiles_NHWC[for_choice], network.outputs[0])
                for method in METHODS:
                    written = _quantised(
                        prepared,
                        tiles_NHWC[~for_choice],
                        method,
                        Path(scratch),
                        reduce_range=reduce_range,
                        symmetric=symmetric,
                        zero_point=zero_point,
                        target=network.onnx_target,
                    )
                    found_NK = _answers(written, tiles_NHWC[for_choice], network.outputs[0])
                    difference = divergence(wanted_NK, found_NK, network.outputs[0])
                    tried[method] = difference
                    if np.isfinite(difference) and (best is None or difference < best[0]):
                        best = (difference, method, written)
        except (
            Exception
        ) as error:  # ONNX Runtime's quantiser raises ValueError, KeyError, RuntimeError and its own
            raise GraphError(
                f"The network cannot be quantised to INT8: {first_line(error)}. Export it as onnx."
            ) from error
    if best is None:
        raise GraphError(
            f"No calibration method of {', '.join(METHODS)} gave finite answers. Export it as onnx."
        )
    return best[2], {
        "calibration": best[1],
        "calibration_tiles": int((~for_choice).sum()),
        "choice_tiles": int(for_choice.sum()),
        "divergence": {method: float(f"{value:.4g}") for method, value in tried.items()},
        "reduce_range": reduce_range,
        "folded_normalisation": zero_point is not None,
    }


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """True if this CPU multiplies 8-bit pairs into 32 bits; True as well where that cannot be read (not Linux)."""
    try:
        flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return True
    return not _VNNI_FLAGS.isdisjoint(flags.partition(":")[2].split())


def _folded(network: Network) -> tuple[bytes, int | None]:
    """The FP32 file with normalisation in the first convolution, and the zero point of the bytes; or as it is, and None."""
    import onnx

    model = onnx.load_from_string(network.onnx)
    zero_point = fold_normalisation(model, network.mean, network.std)
    return (network.onnx if zero_point is None else model.SerializeToString()), zero_point


def _prepared(written: bytes, scratch: Path) -> Path:
    """The FP32 file after ONNX Runtime's own preparation: shapes inferred, constants folded, nodes fused."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, prepared = scratch / "fp32.onnx", scratch / "prepared.onnx"
    source.write_bytes(written)
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    return prepared


def _quantised(
    prepared: Path,
    tiles_NHWC: np.ndarray,
    method: str,
    scratch: Path,
    *,
    reduce_range: bool,
    symmetric: bool,
    zero_point: int | None,
    target: OnnxTarget,
) -> bytes:
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    written = scratch / f"{method}.onnx"
    # The histogram methods hold what a stride of tiles gives at every layer.
    whole_strides = len(tiles_NHWC) // _TILES_A_STRIDE * _TILES_A_STRIDE
    used_NHWC = tiles_NHWC[: whole_strides or len(tiles_NHWC)]
    quantize_static(
        str(prepared),
        str(written),
        _reader(used_NHWC),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=reduce_range,
        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
        op_types_to_quantize=list(QUANTISED_OPERATORS),
        nodes_to_exclude=_normalisation(onnx.load(str(prepared), load_external_data=False)),
        extra_options={
            **({"CalibStridedMinMax": _TILES_A_STRIDE} if whole_strides else {}),
            **({"ActivationSymmetric": True, "QuantizeBias": False} if symmetric else {}),
            **({"TensorQuantOverrides": _bytes_are_quantised(zero_point)} if zero_point is not None else {}),
        },
    )
    model = onnx.load(str(written))
    if zero_point is not None:
        quantise_bytes(model)
    forget_where_it_was_built(model)
    require_target(model, target)
    return bytes(model.SerializeToString(deterministic=True))


def _bytes_are_quantised(zero_point: int) -> dict[str, list[dict[str, Any]]]:
    return {CENTRED: [{"scale": np.array(1.0, np.float32), "zero_point": np.array(zero_point, np.uint8)}]}


def _normalisation(model: Any) -> list[str]:
    """Names of the nodes between the tile and the first layer: they stay FP32, whose steps are finer than a pixel's."""
    names = []
    for node in model.graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            break
        names.append(node.name)
    return names


def _reader(tiles_NHWC: np.ndarray) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Hands tiles to the calibrator; `set_range` chooses those of one stride."""

        def __init__(self) -> None:
            self.set_range(0, len(tiles_NHWC))

        def set_range(self, start_index: int, end_index: int) -> None:
            self.at, self.end = start_index, end_index

        def __len__(self) -> int:
            return len(tiles_NHWC)

        def get_next(self) -> dict[str, np.ndarray] | None:
            if self.at >= self.end:
                return None
            batch = tiles_NHWC[self.at : self.end]
            self.at = self.end
            return {TILES_INPUT: batch}

    return Reader()


def _answers(written: bytes, tiles_NHWC: np.ndarray, output: str) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"])
    parts = [
        session.run([output], {TILES_INPUT: tiles_NHWC[at : at + 8]})[0]
        for at in range(0, len(tiles_NHWC), 8)
    ]
    return np.concatenate(parts)


def divergence(wanted: np.ndarray, got: np.ndarray, output: str) -> float:
    """How far answers are from FP32's: of probabilities the mean Kullback-Leibler divergence in nats, of anything else the
    squared error relative to the variance over the tiles."""
    wanted, got = wanted.astype(np.float64), got.astype(np.float64)
    if output != OUTPUTS[0]:
        return float(((got - wanted) ** 2).mean() / max(float(wanted.var(axis=0).mean()), 1e-30))
    wanted, got = np.maximum(wanted, 1e-12), np.maximum(got, 1e-12)
    return float((wanted * (np.log(wanted) - np.log(got))).sum(axis=1).mean())


@contextlib.contextmanager
def _quiet_quantiser() -> Iterator[None]:
    # The quantiser logs to the root logger and prints its progress.
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
