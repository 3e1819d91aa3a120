"""TensorRT plans (Triton's ``tensorrt`` backend) and TensorRT-RTX engines, through the same code.

TensorRT 11 has no precision flags: a network is strongly typed, and its precision is that of the ONNX graph it is parsed
from: FP32, FP16 (as ``onnx-fp16`` writes it), or INT8 (Q/DQ pairs as ``onnx-int8`` writes them). Precision is shown
three times, and a plan in another one than was asked for is refused: the types of all products of the network before
the build; the built engine's own program, read from the file (`exporters.formats.engine_file`; TensorRT-RTX); and the engine
inspector, which needs a GPU. The batch range 1 to `max_batch` is an optimisation profile.

- ``tensorrt*`` runs only under the TensorRT version, and on the kind of GPU, that it was built with: build it
  inside the container that will serve it, where the package `tensorrt` is:
  ``python -m exporters export CHECKPOINT --repository DIR --formats onnx,tensorrt-fp16 --instance-kind gpu``.
- ``tensorrt-rtx*`` (PyPI: tensorrt-rtx-cu13) builds on a machine without a GPU and is compiled for the GPU when it is
  loaded. Triton has no backend for it: it is built and inspected, and always unproven.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from exporters.errors import DamagedArtifactError, FormatError, GraphError, PrecisionError, UnavailableError
from exporters.formats.engine_file import check_engine_version, check_program, engine_program
from exporters.formats.interface import TILES_INPUT, Artifact, Network, Runner, ServedFormat, answer_of
from exporters.triton_config import OUTPUTS

_INSPECTED = MappingProxyType({"fp32": "FP32", "fp16": "FP16", "int8": "Int8"})
"""Precision -> part of the inspector's name of a data type ("Channel major FP16 format", "... Int8 format")."""
_TYPED = MappingProxyType({"fp32": "FLOAT", "fp16": "HALF", "int8": "INT8"})
"""Precision -> tensorrt.DataType."""
_TORCH_TYPES = MappingProxyType({"FLOAT": torch.float32, "HALF": torch.float16, "INT64": torch.int64})
TIMING_CACHE_VARIABLE = "CLOTLINE_TENSORRT_TIMING_CACHE"
"""Environment variable: a file that keeps what TensorRT has timed, for the next build with the same version and GPU."""
_PRODUCTS = frozenset({"CONVOLUTION", "MATRIX_MULTIPLY"})


class TensorRt(ServedFormat):
    """FP32; see the module."""

    name = "tensorrt"
    machine = "gpu"
    backend = "tensorrt"
    artifact_filename = "model.plan"
    module = "tensorrt"
    how_to_get = (
        "build inside the container that will serve it, for example docker run --gpus all -v $PWD:/work -w /work "
        "nvcr.io/nvidia/tritonserver:26.07-py3 bash -c 'pip install tensorrt && python -m exporters export ...', with the "
        "TensorRT version of that container"
    )

    def require(self) -> None:
        """See ServedFormat."""
        if importlib.util.find_spec(self.module) is None:
            raise UnavailableError(
                f"{self.name} needs the package {self.module}, which is not installed here: {self.how_to_get}."
            )

    def unproven_here(self) -> str | None:
        """See ServedFormat."""
        if self.runs_here():
            return None
        return "no GPU of this process can run the plan; compare it where it will be served"

    def runs_here(self) -> bool:
        """See ServedFormat."""
        return torch.cuda.is_available()

    def build(self, network: Network) -> Artifact:
        """See ServedFormat; raises PrecisionError if the inspector shows another precision than was asked for."""
        written, notes = self._graph(network)
        trt = importlib.import_module(self.module)
        plan, typed = _built(trt, written, network, self.name, self.precision)
        return Artifact(
            {self.artifact_filename: plan},
            {
                **notes,
                "runtime": f"{self.module} {trt.__version__}",
                "products_by_type": typed,
                **proven(trt, self.name, self.precision, plan),
            },
        )

    def _graph(self, network: Network) -> tuple[bytes, dict[str, Any]]:
        if self.precision == "fp16":
            from exporters.formats.onnx_fp16 import to_fp16

            return to_fp16(network.onnx)
        if self.precision == "int8":
            from exporters.formats.onnx_int8 import quantise

            return quantise(network, symmetric=True)
        return network.onnx, {}

    def open(self, path: Path, outputs: Sequence[str] = OUTPUTS) -> Runner:
        """See ServedFormat; on the GPU, without which an engine cannot be opened."""
        trt = importlib.import_module(self.module)
        check_engine_version(path.read_bytes(), self.module, trt.__version__)
        return runner(deserialised(trt, path), outputs)


class TensorRtFp16(TensorRt):
    """FP16."""

    name = "tensorrt-fp16"
    precision = "fp16"
    baseline = "tensorrt"


class TensorRtInt8(TensorRt):
    """INT8."""

    name = "tensorrt-int8"
    precision = "int8"
    baseline = "tensorrt"
    calibrated = True


class _Rtx:
    module = "tensorrt_rtx"
    how_to_get = "python -m pip install tensorrt-rtx-cu13 (no GPU needed)"

    def unproven_here(self) -> str | None:
        """See ServedFormat."""
        return "Triton has no backend for TensorRT-RTX"


class TensorRtRtx(_Rtx, TensorRt):
    """FP32."""

    name = "tensorrt-rtx"


class TensorRtRtxFp16(_Rtx, TensorRt):
    """FP16."""

    name = "tensorrt-rtx-fp16"
    precision = "fp16"
    baseline = "tensorrt-rtx"


class TensorRtRtxInt8(_Rtx, TensorRt):
    """INT8."""

    name = "tensorrt-rtx-int8"
    precision = "int8"
    baseline = "tensorrt-rtx"
    calibrated = True


def _built(
    trt: Any, written: bytes, network: Network, name: str, precision: str
) -> tuple[bytes, dict[str, int]]:
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    definition = builder.create_network(1 << int(flags) if flags is not None else 0)
    parser = trt.OnnxParser(definition, logger)
    if not parser.parse(_cast_first(written)):
        first = parser.get_error(0).desc() if parser.num_errors else "no reason given"
        raise GraphError(f"{trt.__name__} cannot read the network for {name}: {first}. Export it as onnx.")
    typed = check_typed(name, precision, definition)
    config = builder.create_builder_config()
    if hasattr(config, "profiling_verbosity"):
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector then tells data types
    profile = builder.create_optimization_profile()
    side, most = network.input_size_px, network.max_batch
    profile.set_shape(TILES_INPUT, (1, side, side, 3), (most, side, side, 3), (most, side, side, 3))
    config.add_optimization_profile(profile)
    with _timing_cache(config):
        plan = builder.build_serialized_network(definition, config)
    if plan is None:
        raise GraphError(f"{trt.__name__} {trt.__version__} could not build {name}. Export it as onnx.")
    return bytes(plan), typed


@contextlib.contextmanager
def _timing_cache(config: Any) -> Iterator[None]:
    """Timings of an earlier build are used, and those of this one kept, in the file named by TIMING_CACHE_VARIABLE."""
    told = os.environ.get(TIMING_CACHE_VARIABLE)
    if not told:
        yield
        return
    path = Path(told)
    try:
        before = path.read_bytes() if path.exists() else b""
        if not config.set_timing_cache(config.create_timing_cache(before), False):
            raise FormatError(
                f"{path}, named by {TIMING_CACHE_VARIABLE}, is of another version or GPU. Name another file, or delete it."
            )
        yield
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as aside:
            aside.write(bytes(config.get_timing_cache().serialize()))
        os.replace(aside.name, path)
    except OSError as error:
        raise FormatError(
            f"{path}, named by {TIMING_CACHE_VARIABLE}, cannot be used: {error.strerror}."
        ) from error


def proven(trt: Any, name: str, precision: str, plan: bytes) -> dict[str, Any]:
    """What the built engine itself shows of its precision: its program, and where there is a GPU the inspector.

    Raises:
        PrecisionError: another precision than was asked for, or nothing at all.
    """
    program, inspected = engine_program(plan), None
    if program is not None:
        check_program(name, precision, program)
    if torch.cuda.is_available():  # to read an engine back takes a GPU
        inspected = check_inspected(name, precision, inspect(trt, plan))
    if program is None and inspected is None:
        raise PrecisionError(
            f"{name}: neither the engine's file nor an engine inspector (there is no GPU) shows the precision that {trt.__name__} "
            f"{trt.__version__} built. Build it on a machine with a GPU. Nothing was published."
        )
    return {
        "engine": None if program is None else dataclasses.asdict(program),
        "inspected": inspected,
    }


def _cast_first(written: bytes) -> bytes:
    """The same graph with tile -> Cast -> Transpose: TensorRT takes uint8 as an input, and only to cast it."""
    import onnx

    model = onnx.load_from_string(written)
    graph = model.graph
    transpose = next((n for n in graph.node if n.input[:1] == [TILES_INPUT]), None)
    cast = next((n for n in graph.node if transpose and n.input[:1] == [transpose.output[0]]), None)
    if transpose is None or cast is None or (transpose.op_type, cast.op_type) != ("Transpose", "Cast"):
        return written
    between, after = transpose.output[0], cast.output[0]
    cast.input[0], cast.output[0] = TILES_INPUT, f"{between}_cast"
    transpose.input[0], transpose.output[0] = f"{between}_cast", after
    first, second = list(graph.node).index(transpose), list(graph.node).index(cast)
    nodes = list(graph.node)
    nodes[first], nodes[second] = nodes[second], nodes[first]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return bytes(model.SerializeToString())


def deserialised(trt: Any, path: Path) -> Any:
    """The engine in a file; raises DamagedArtifactError where this version of TensorRT cannot read it."""
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    try:
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
    except Exception as error:  # the bindings raise RuntimeError and TypeError
        raise DamagedArtifactError(f"{trt.__name__} cannot open {path}: {error}") from error
    if engine is None:
        raise DamagedArtifactError(
            f"{trt.__name__} {trt.__version__} cannot open {path}: it is damaged, or of another version. Build it "
            "with the version that will serve it."
        )
    return engine


def runner(engine: Any, outputs: Sequence[str]) -> Runner:
    """An engine on the current CUDA device, its tensors held by PyTorch."""
    context = engine.create_execution_context()

    def run(tiles_NHWC: np.ndarray) -> Any:
        tiles = torch.from_numpy(tiles_NHWC).cuda()
        context.set_input_shape(TILES_INPUT, tuple(tiles.shape))
        held = {
            name: torch.empty(
                tuple(context.get_tensor_shape(name)),
                dtype=_TORCH_TYPES[str(engine.get_tensor_dtype(name)).rpartition(".")[2]],
                device=tiles.device,
            )
            for name in outputs
        }
        for name, tensor in {TILES_INPUT: tiles, **held}.items():
            context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream()
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError("the engine did not run")
        stream.synchronize()
        return answer_of([held[name].cpu().numpy() for name in outputs], outputs)

    return run


def inspect(trt: Any, plan: bytes) -> list[dict[str, Any]]:
    """The layers of an engine, as the engine inspector describes them (JSON types)."""
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise GraphError(f"{trt.__name__} cannot read back what it has just built.")
    inspector = engine.create_engine_inspector()
    document = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    return [layer if isinstance(layer, dict) else {"Name": layer} for layer in document.get("Layers", [])]


def check_inspected(name: str, precision: str, layers: list[dict[str, Any]]) -> dict[str, int]:
    """Data types of the inputs of all layers of an engine, counted.

    Raises:
        PrecisionError: the precision that was asked for does not occur, or the inspector tells no data types.
    """
    counted = Counter(
        str(tensor.get("Format/Datatype", tensor.get("Datatype", "unknown")))
        for layer in layers
        for tensor in layer.get("Inputs", [])
        if isinstance(tensor, dict)
    )
    if not any(_INSPECTED[precision].lower() in kind.lower() for kind in counted):
        raise PrecisionError(
            f"{name}: the engine inspector shows no layer in {precision} (data types of inputs: "
            f"{dict(counted) or 'none told'}): the plan is not what was asked for. Nothing was published."
        )
    return dict(counted)


def check_typed(name: str, precision: str, definition: Any) -> dict[str, int]:
    """Data types in which the convolutions and matrix products of a strongly typed network compute, counted.

    A strongly typed network is built in the types that it has; this needs no GPU, which the inspector does. INT8 is
    what a dequantising layer hands to a product: the builder fuses the two.

    Raises:
        PrecisionError: a product is in another precision than was asked for.
    """
    made_by = {}
    layers = [definition.get_layer(number) for number in range(definition.num_layers)]
    for layer in layers:
        for number in range(layer.num_outputs):
            made_by[layer.get_output(number).name] = layer
    counted: Counter[str] = Counter()
    for layer in layers:
        kind = str(layer.type).rpartition(".")[2]
        if kind not in _PRODUCTS:
            continue
        source = layer.get_input(0)
        maker = made_by.get(source.name)
        if maker is not None and str(maker.type).endswith("DEQUANTIZE"):
            source = maker.get_input(0)
        counted[str(source.dtype).rpartition(".")[2]] += 1
    if not counted or set(counted) != {_TYPED[precision]}:
        raise PrecisionError(
            f"{name}: the layers compute in {dict(counted) or 'no type that could be told'}, not only in "
            f"{_TYPED[precision]}: the plan would not be what was asked for. Nothing was published."
        )
    return dict(counted)
