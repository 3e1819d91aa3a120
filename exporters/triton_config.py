"""Configurations (``config.pbtxt``) of the Triton models that Clotline publishes.

They are built with Triton's own protobuf, ``ModelConfig`` of ``tritonclient.grpc.model_config_pb2``
(https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto), written with
protobuf's text format, and read back with it. Models::

    tile_preprocess          tile   BYTES [N,1]      -> tiles  UINT8 [N,S,S,3] (RGB)
    tile_network_<format>    tiles  UINT8 [N,S,S,3]  -> probabilities FP32 [N,K], confidence FP32 [N,1],
                                                        label_index INT64 [N,1]
    tile_classifier[_<format>]   the ensemble of the two, pinned to one version of each

    tile_encoder_<format>[_<m>]  tiles  UINT8 [N,S,S,3]  -> embedding FP32 [N,D]; <m> where there are several members
    tile_embedder_<format>   the ensemble of tile_preprocess and all encoders: tile -> embeddings[_<m>] FP32 [N,D]
    slide_head_onnx          embeddings[_<m>] FP32 [T,D] -> the slide's answer, see `exporters.slide.head`; no batching
    slide_classifier[_<format>]  tiles  BYTES [T] -> the slide's answer; Python, asks the two above
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton

from exporters.errors import RepositoryError
from slides.model_metrics import ANSWERS_FOR

CONFIG_FILENAME = "config.pbtxt"
LABELS_FILENAME = "labels.txt"
PREPROCESS_MODEL = "tile_preprocess"
CLASSIFIER_MODEL = "tile_classifier"
NETWORK_PREFIX = "tile_network_"
ENCODER_PREFIX = "tile_encoder_"
EMBEDDER_PREFIX = "tile_embedder_"
HEAD_MODEL = "slide_head_onnx"
SLIDE_MODEL = "slide_classifier"

OUTPUTS = ("probabilities", "confidence", "label_index")
"""Names of the answer's tensors, in the order in which the served network returns them."""

CPU_DYNAMIC_BATCH = 2
"""Tiles of different requests that Triton gathers for one execution on a CPU, unless the network is a fast one. With more, one
instance takes what waits while the other one idles (docs/performance.md); a single request may still hold up to
`max_batch_size` tiles."""

ModelConfig = triton.ModelConfig

INSTANCE_KINDS = MappingProxyType(
    {
        "cpu": triton.ModelInstanceGroup.KIND_CPU,
        "gpu": triton.ModelInstanceGroup.KIND_GPU,
        "auto": triton.ModelInstanceGroup.KIND_AUTO,
    }
)
"""Where a network runs: on the CPU, where the parity gate ran it; on every GPU; or as the server finds."""


@dataclass(frozen=True)
class NetworkTensors:
    """Names under which a backend knows a network's tensors: one input, and its outputs in their order."""

    input: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class SlideOutput:
    """A tensor of a slide's answer: name, Triton's type without ``TYPE_`` (``FP32``), shape with -1 for what is free."""

    name: str
    data_type: str
    dims: tuple[int, ...]


def preprocess_config(
    *,
    input_size_px: int,
    max_batch: int,
    instances: int,
    max_tile_bytes: int,
    max_tile_pixels: int,
) -> triton.ModelConfig:
    """Configuration of the Python model that decodes and resizes encoded tiles.

    It has no dynamic batches: where Triton gathers requests for a Python model, one whose BYTES are cut off fails all of
    them before the model sees any (docs/serving.md).

    Args:
        input_size_px: side S of the decoded tile, pixels.
        max_batch: most tiles in one execution.
        instances: processes that decode at the same time (the model runs on the CPU wherever it is served; `exporters.cpu_layout`).
        max_tile_bytes: an encoded tile with more bytes is refused.
        max_tile_pixels: a tile whose header announces more pixels is refused.
    """
    config = triton.ModelConfig(name=PREPROCESS_MODEL, backend="python", max_batch_size=max_batch)
    config.input.add(name="tile", data_type=triton.TYPE_STRING, dims=[1])
    config.output.add(name="tiles", data_type=triton.TYPE_UINT8, dims=[input_size_px, input_size_px, 3])
    config.instance_group.add(count=instances, kind=triton.ModelInstanceGroup.KIND_CPU)
    _set_parameters(
        config,
        {
            "input_size_px": str(input_size_px),
            "max_tile_bytes": str(max_tile_bytes),
            "max_tile_pixels": str(max_tile_pixels),
        },
    )
    return config


def network_config(
    name: str,
    *,
    backend: str,
    artifact_filename: str,
    tensors: NetworkTensors,
    parameters: Mapping[str, str],
    input_size_px: int,
    classes: int,
    max_batch: int,
    instances: int,
    instance_kind: str,
    versions_loaded: int,
    platform: str = "",
    embedding_dim: int | None = None,
    answers_for: tuple[str, Sequence[str]] | None = None,
    gathered: int = CPU_DYNAMIC_BATCH,
) -> triton.ModelConfig:
    """Configuration of a network for the native or a Python-based backend of that name.

    Args:
        name: the model's name, ``tile_network_<format>`` or ``tile_encoder_<format>``.
        backend: ``onnxruntime``, ``pytorch``, ``openvino`` or ``tensorrt``.
        artifact_filename: file in the version directory.
        tensors: names of the tensors as the backend expects them.
        parameters: the backend's own documented parameters.
        input_size_px: side S of the network's input, pixels.
        classes: number K of classes.
        max_batch: most tiles in one execution.
        instances: executions at the same time, on each device.
        instance_kind: one of INSTANCE_KINDS.
        versions_loaded: newest versions that the server loads. 2 lets an ensemble that is pinned to the version before go on answering
            while a new version is brought in; 1 where the versions differ in shape.
        platform: Triton's platform, where a backend tells its formats apart by it.
        embedding_dim: D of an encoder, whose one output is FP32 [N, D]; None for a classifier.
        answers_for: the public model whose predictions its answers are, and its classes. Our Python-based backends count
            them (docs/metrics.md), native ones do not look for the parameter.
        gathered: tiles of different requests that Triton gathers for one execution on a CPU (`exporters.cpu_layout`).
    """
    config = triton.ModelConfig(
        name=name,
        backend=backend,
        platform=platform,
        max_batch_size=max_batch,
        default_model_filename=artifact_filename,
    )
    config.version_policy.latest.num_versions = versions_loaded
    config.input.add(name=tensors.input, data_type=triton.TYPE_UINT8, dims=[input_size_px, input_size_px, 3])
    if embedding_dim is None:
        _add_outputs(config, tensors.outputs, classes)
    else:
        config.output.add(name=tensors.outputs[0], data_type=triton.TYPE_FP32, dims=[embedding_dim])
    config.instance_group.add(count=instances, kind=INSTANCE_KINDS[instance_kind])
    config.dynamic_batching.SetInParent()
    if instance_kind == "cpu":  # Triton gathers up to the largest preferred size
        config.dynamic_batching.preferred_batch_size.append(min(gathered, max_batch))
    for batch in sorted({1, *config.dynamic_batching.preferred_batch_size, max_batch}):
        warmup = config.model_warmup.add(name=f"batch_{batch}", batch_size=batch)
        tiles = warmup.inputs[tensors.input]
        tiles.data_type = triton.TYPE_UINT8
        tiles.dims.extend([input_size_px, input_size_px, 3])
        tiles.zero_data = True
    _set_parameters(config, parameters)
    if answers_for is not None:
        model, class_names = answers_for
        told = {"classes": list(class_names), "model": model}
        _set_parameters(config, {ANSWERS_FOR: json.dumps(told, ensure_ascii=False, separators=(",", ":"))})
    return config


def classifier_config(
    name: str,
    *,
    network: triton.ModelConfig,
    tensors: NetworkTensors,
    network_version: int,
    preprocess_version: int,
    parameters: Mapping[str, str],
) -> triton.ModelConfig:
    """Configuration of the ensemble ``tile -> tile_preprocess -> network -> OUTPUTS``.

    Both steps are pinned to a version: an unpinned ensemble can mix versions, or go down, while a
    composing model is loaded.

    Args:
        name: ``tile_classifier`` or ``tile_classifier_<format>``.
        network: configuration of the network that answers; its batch limit and classes are taken over.
        tensors: names of that network's tensors.
        network_version: version of the network that answers.
        preprocess_version: version of ``tile_preprocess``.
        parameters: what clients may read from the model's configuration.
    """
    config = triton.ModelConfig(name=name, platform="ensemble", max_batch_size=network.max_batch_size)
    config.input.add(name="tile", data_type=triton.TYPE_STRING, dims=[1])
    _add_outputs(config, OUTPUTS, network.output[0].dims[0])
    decode = config.ensemble_scheduling.step.add(
        model_name=PREPROCESS_MODEL, model_version=preprocess_version
    )
    decode.input_map["tile"] = "tile"
    decode.output_map["tiles"] = "tiles"
    classify = config.ensemble_scheduling.step.add(model_name=network.name, model_version=network_version)
    classify.input_map[tensors.input] = "tiles"
    for theirs, ours in zip(tensors.outputs, OUTPUTS, strict=True):
        classify.output_map[theirs] = ours
    _set_parameters(config, parameters)
    return config


def embedder_config(
    name: str,
    *,
    encoders: Sequence[tuple[triton.ModelConfig, NetworkTensors]],
    outputs: Sequence[str],
    version: int,
    preprocess_version: int,
) -> triton.ModelConfig:
    """Configuration of the ensemble ``tile -> tile_preprocess -> encoders``; they run at the same time on the same tiles.

    Args:
        name: ``tile_embedder_<format>``.
        encoders: configuration of each member's encoder, and the names of its tensors.
        outputs: what the ensemble calls the members' embeddings.
        version: of the encoders.
        preprocess_version: of ``tile_preprocess``.
    """
    first, _ = encoders[0]
    config = triton.ModelConfig(name=name, platform="ensemble", max_batch_size=first.max_batch_size)
    config.input.add(name="tile", data_type=triton.TYPE_STRING, dims=[1])
    decode = config.ensemble_scheduling.step.add(
        model_name=PREPROCESS_MODEL, model_version=preprocess_version
    )
    decode.input_map["tile"] = "tile"
    decode.output_map["tiles"] = "tiles"
    for (encoder, tensors), output in zip(encoders, outputs, strict=True):
        config.output.add(name=output, data_type=triton.TYPE_FP32, dims=list(encoder.output[0].dims))
        step = config.ensemble_scheduling.step.add(model_name=encoder.name, model_version=version)
        step.input_map[tensors.input] = "tiles"
        step.output_map[tensors.outputs[0]] = output
    return config


def head_config(
    *, inputs: Mapping[str, int], outputs: Sequence[SlideOutput], instances: int
) -> triton.ModelConfig:
    """Configuration of ``slide_head_onnx``, which takes one slide at a time.

    Args:
        inputs: name -> D of each member's embeddings.
        outputs: what it answers.
        instances: slides at the same time.
    """
    config = triton.ModelConfig(
        name=HEAD_MODEL, backend="onnxruntime", max_batch_size=0, default_model_filename="model.onnx"
    )
    warmup = config.model_warmup.add(name="two_tiles", batch_size=0)
    for name, dim in inputs.items():
        config.input.add(name=name, data_type=triton.TYPE_FP32, dims=[-1, dim])
        zeros = warmup.inputs[name]
        zeros.data_type = triton.TYPE_FP32
        zeros.dims.extend([2, dim])
        zeros.zero_data = True
    _add_slide_outputs(config, outputs)
    config.instance_group.add(count=instances, kind=triton.ModelInstanceGroup.KIND_CPU)
    _set_parameters(config, {"intra_op_thread_count": "1"})
    return config


def slide_classifier_config(
    name: str, *, outputs: Sequence[SlideOutput], instances: int, parameters: Mapping[str, str]
) -> triton.ModelConfig:
    """Configuration of the Python model that answers for a slide.

    Args:
        name: ``slide_classifier`` or ``slide_classifier_<format>``.
        outputs: what it answers.
        instances: slides that are worked on at the same time; all others wait in Triton's queue.
        parameters: see ``model_repository/slide_classifier/1/model.py``.
    """
    config = triton.ModelConfig(name=name, backend="python", max_batch_size=0)
    config.input.add(name="tiles", data_type=triton.TYPE_STRING, dims=[-1])
    _add_slide_outputs(config, outputs)
    config.instance_group.add(count=instances, kind=triton.ModelInstanceGroup.KIND_CPU)
    _set_parameters(config, parameters)
    return config


def to_text(config: triton.ModelConfig) -> str:
    """The configuration as ``config.pbtxt``, read back and compared.

    Raises:
        RepositoryError: what was written does not read back as the same configuration.
    """
    text = f"# Generated by `python -m exporters export`; do not edit.\n{text_format.MessageToString(config)}"
    if from_text(text, origin=f"the generated configuration of {config.name}") != config:
        raise RepositoryError(
            f"The configuration of {config.name} does not read back as it was built. Check that tritonclient "
            "and protobuf are of the versions pinned by Clotline."
        )
    return text


def from_text(text: str, *, origin: str) -> triton.ModelConfig:
    """Read a ``config.pbtxt``.

    Args:
        text: content of the file.
        origin: where it came from, for the error.

    Raises:
        RepositoryError: the text is no ModelConfig.
    """
    try:
        return text_format.Parse(text, triton.ModelConfig())
    except text_format.ParseError as error:
        raise RepositoryError(
            f"{origin} is not a Triton model configuration: {error}. Repair or delete it, then export again."
        ) from error


def labels_text(class_names: Sequence[str]) -> str:
    """Content of ``labels.txt``: a class a line, in the order of the probabilities.

    Raises:
        RepositoryError: a name holds a line break, which the file cannot express.
    """
    for class_name in class_names:
        if len(class_name.splitlines()) != 1:
            raise RepositoryError(
                f"The class name {class_name!r} holds a line break; Triton's label file has a class a line. "
                "Rename the class and train again."
            )
    return "".join(f"{class_name}\n" for class_name in class_names)


def _add_outputs(config: triton.ModelConfig, names: Sequence[str], classes: int) -> None:
    probabilities, confidence, label_index = names
    config.output.add(
        name=probabilities, data_type=triton.TYPE_FP32, dims=[classes], label_filename=LABELS_FILENAME
    )
    config.output.add(name=confidence, data_type=triton.TYPE_FP32, dims=[1])
    config.output.add(name=label_index, data_type=triton.TYPE_INT64, dims=[1])


def _add_slide_outputs(config: triton.ModelConfig, outputs: Sequence[SlideOutput]) -> None:
    for output in outputs:
        config.output.add(
            name=output.name,
            data_type=triton.DataType.Value(f"TYPE_{output.data_type}"),
            dims=list(output.dims),
            label_filename=LABELS_FILENAME if output.name == OUTPUTS[0] else "",
        )


def _set_parameters(config: triton.ModelConfig, parameters: Mapping[str, str]) -> None:
    for key, value in parameters.items():
        config.parameters[key].string_value = value
