"""A Release with a network of three operators, in the exporter's format: for benchmarks and tests of releases alone.

The network's logit of the first class is `slope * (mean of all pixels) + bias`, the other logits are 0; so two releases with
different numbers give answers that cannot be mistaken for one another. Preprocessing is the real `tile_preprocess`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2 as triton

from serving.errors import ServingError
from slides.decode import decode_tile, encode_tile
from slides.spec import ModelSpec

PREPROCESS = Path(__file__).resolve().parents[2] / "model_repository" / "tile_preprocess" / "1" / "model.py"
SLOPE = 0.02
TILES = 4
MAX_TILE_BYTES = 1 << 20
OUTPUTS = (
    ("probabilities", triton.TYPE_FP32),
    ("confidence", triton.TYPE_FP32),
    ("label_index", triton.TYPE_INT64),
)


def tiles(side_px: int, count: int = TILES) -> list[bytes]:
    """JPEG tiles of that side, different from one another, the same in every process."""
    rng = np.random.default_rng(17)
    made = []
    for number in range(count):
        blotches = rng.integers(0, 128 + 32 * number, (8, 8, 3), dtype=np.uint8)
        whole = np.kron(blotches, np.ones((-(-side_px // 8), -(-side_px // 8), 1), np.uint8))
        made.append(encode_tile(np.ascontiguousarray(whole[:side_px, :side_px]), 90))
    return made


def answer(data: bytes, input_px: int, bias: float, classes: int) -> NDArray[np.float64]:
    """What the network answers to a tile, float64 [K]."""
    logits = np.zeros(classes)
    logits[0] = SLOPE * decode_tile(data, input_px).astype(np.float64).mean() + bias
    raised = np.exp(logits - logits.max())
    return np.asarray(raised / raised.sum())


def make_release(
    directory: Path,
    *,
    bias: float,
    input_px: int = 32,
    tile_px: int = 64,
    class_names: Sequence[str] = ("CE", "LAA"),
    formats: Sequence[str] = ("onnx",),
    instances: int = 1,
    max_batch: int = 4,
) -> Path:
    """Write a release of kind `tile`; returns its directory.

    Args:
        directory: must not exist.
        bias: tells this release's answers from another's.
        input_px: side of the network's input.
        tile_px: side of the golden tiles.
        class_names: their number is that of the outputs.
        formats: names; each has the same network, and the first is `tile_classifier`.
        instances: of preprocessing and network.
        max_batch: of all models.
    """
    spec = ModelSpec(class_names=tuple(class_names), tile_size_px=tile_px, um_per_px=0.5, input_size_px=input_px,
                     tiles_per_slide=4, min_tissue_share=0.5)  # fmt: skip
    classes = len(class_names)
    files: dict[str, bytes] = {"models/tile_preprocess/1/model.py": PREPROCESS.read_bytes()}
    configs = [_preprocess(input_px, instances, max_batch)]
    classifiers = {}
    for number, name in enumerate(formats):
        network = _network(f"tile_network_{name}", input_px, classes, instances, max_batch)
        public = "tile_classifier" if number == 0 else f"tile_classifier_{name}"
        configs += [network, _classifier(public, network, spec)]
        classifiers[public] = {"network": network.name, "format": name}
        files[f"models/{network.name}/1/model.onnx"] = _graph(input_px, bias, classes)
        for model in (network.name, public):
            files[f"models/{model}/labels.txt"] = "".join(f"{c}\n" for c in class_names).encode()
        files[f"models/{public}/1/release.json"] = b"{}"
    for config in configs:
        files[f"models/{config.name}/config.pbtxt"] = text_format.MessageToString(config).encode()
    items = []
    for number, data in enumerate(tiles(tile_px)):
        files[f"golden/{number:04d}.jpg"] = data
        items.append({"path": f"{number:04d}.jpg", "label": class_names[0], "image_id": f"p{number}_0",
                      "probabilities": answer(data, input_px, bias, classes).tolist()})  # fmt: skip
    golden = {
        "format": "clotline.golden",
        "version": 1,
        "kind": "tile",
        "class_names": list(class_names),
        "items": items,
    }
    files["golden/golden.json"] = json.dumps(golden).encode()
    write_files(directory, files)
    write_manifest(directory, classifiers, spec)
    return directory


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    """Path -> content, below a directory that must not exist."""
    directory.mkdir(parents=True)
    for path, content in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)


def write_manifest(directory: Path, classifiers: dict[str, Any], spec: ModelSpec) -> None:
    """Write the release.json that belongs to the files that lie there."""
    entries = {}
    for path in sorted(
        p for folder in ("models", "golden") for p in (directory / folder).rglob("*") if p.is_file()
    ):
        content = path.read_bytes()
        entries[str(path.relative_to(directory))] = {
            "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}  # fmt: skip
    lines = sorted(f"{entry['sha256']}  {path}\n" for path, entry in entries.items())
    parity = {
        "in_process": None,
        "served": None,
        "not_served_because": "a network made for benchmarks and tests",
    }
    manifest = {
        "format": "clotline.release",
        "version": 2,
        "kind": "tile",
        "release_id": hashlib.sha256("".join(lines).encode()).hexdigest()[:16],
        "classifiers": {
            name: {"parts": None, "network": None, **entry} for name, entry in classifiers.items()
        },
        "formats": {
            entry["format"]: {
                "model": entry["network"],
                "classifiers": [name],
                "precision": "fp32",
                "status": "accepted",
                "reasons": [],
                "bytes": 0,
                "files": {},
                "parity": parity,
                "speed": None,
                "notes": {},
            }
            for name, entry in classifiers.items()
        },
        "tolerances": {"fp32": {"max_abs_diff": 1e-4}},
        "spec": json.loads(spec.to_json()),
        "checkpoint": {"kind": "tile", "architecture": "mean"},
        "mlflow": None,
        "pretrained": None,
        "git_commit": "unknown",
        "git_dirty": False,
        "versions": {},
        "onnx": None,
        "machine": {},
        "created_utc": "2026-01-01T00:00:00+00:00",
        "files": entries,
    }
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (directory / "release.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))


def _preprocess(input_px: int, instances: int, max_batch: int) -> triton.ModelConfig:
    config = triton.ModelConfig(name="tile_preprocess", backend="python", max_batch_size=max_batch)
    config.input.add(name="tile", data_type=triton.TYPE_STRING, dims=[1])
    config.output.add(name="tiles", data_type=triton.TYPE_UINT8, dims=[input_px, input_px, 3])
    config.instance_group.add(count=instances, kind=triton.ModelInstanceGroup.KIND_CPU)
    config.parameters["input_size_px"].string_value = str(input_px)
    config.parameters["max_tile_bytes"].string_value = str(MAX_TILE_BYTES)
    return config


def _network(name: str, input_px: int, classes: int, instances: int, max_batch: int) -> triton.ModelConfig:
    config = triton.ModelConfig(name=name, backend="onnxruntime", max_batch_size=max_batch,
                                default_model_filename="model.onnx")  # fmt: skip
    config.input.add(name="tiles", data_type=triton.TYPE_UINT8, dims=[input_px, input_px, 3])
    _add_outputs(config, classes)
    config.instance_group.add(count=instances, kind=triton.ModelInstanceGroup.KIND_CPU)
    config.dynamic_batching.SetInParent()
    config.parameters["intra_op_thread_count"].string_value = "1"
    return config


def _classifier(name: str, network: triton.ModelConfig, spec: ModelSpec) -> triton.ModelConfig:
    config = triton.ModelConfig(name=name, platform="ensemble", max_batch_size=network.max_batch_size)
    config.input.add(name="tile", data_type=triton.TYPE_STRING, dims=[1])
    _add_outputs(config, len(spec.class_names))
    decode = config.ensemble_scheduling.step.add(model_name="tile_preprocess", model_version=1)
    decode.input_map["tile"] = "tile"
    decode.output_map["tiles"] = "tiles"
    classify = config.ensemble_scheduling.step.add(model_name=network.name, model_version=1)
    classify.input_map["tiles"] = "tiles"
    for output, _ in OUTPUTS:
        classify.output_map[output] = output
    config.parameters["clotline_spec"].string_value = spec.to_json()
    return config


def _add_outputs(config: triton.ModelConfig, classes: int) -> None:
    for name, dtype in OUTPUTS:
        output = config.output.add(
            name=name, data_type=dtype, dims=[classes if name == "probabilities" else 1]
        )
        if name == "probabilities":
            output.label_filename = "labels.txt"


def _graph(input_px: int, bias: float, classes: int) -> bytes:
    try:
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise ServingError(
            "writing the tiny network needs onnx: pip install 'clotline[export]', or name two real releases."
        ) from error
    weights = np.zeros((1, classes), np.float32)
    weights[0, 0] = SLOPE
    offsets = np.zeros(classes, np.float32)
    offsets[0] = bias
    constants = {"axes": np.array([1, 2, 3]), "column": np.array([-1, 1]), "class_axis": np.array([1]),
                 "slope": weights, "bias": offsets}  # fmt: skip
    nodes = [
        helper.make_node("Cast", ["tiles"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
        helper.make_node("Reshape", ["mean", "column"], ["means"]),
        helper.make_node("MatMul", ["means", "slope"], ["sloped"]),
        helper.make_node("Add", ["sloped", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ReduceMax", ["probabilities", "class_axis"], ["confidence"], keepdims=1),
        helper.make_node("ArgMax", ["probabilities"], ["label_index"], axis=1, keepdims=1),
    ]
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tiny",
        [tensor("tiles", TensorProto.UINT8, ["batch", input_px, input_px, 3])],
        [
            tensor("probabilities", TensorProto.FLOAT, ["batch", classes]),
            tensor("confidence", TensorProto.FLOAT, ["batch", 1]),
            tensor("label_index", TensorProto.INT64, ["batch", 1]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())
