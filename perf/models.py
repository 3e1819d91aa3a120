"""python -m perf models --out runs/perf/resnet18 --architecture resnet18 --formats onnx,openvino-int8

Makes a model repository to measure: a network of torchvision with random weights, in the formats named, with the
configurations that an export writes. The first format answers as tile_classifier, each further one as
tile_classifier_<format>. How fast a network is does not depend on what it learned; what an export proves (parity, accuracy)
is not proven here, so such a repository is good for nothing else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perf.errors import PerfError, PerfInputError
from perf.machine import cores
from perf.tiles import benchmark_tiles
from slides.spec import ModelSpec

if TYPE_CHECKING:
    from exporters.formats.interface import Network

CLASS_NAMES = ("CE", "LAA")
_CALIBRATION_TILES = 32


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """What `models` and `release` both need to know of the network."""
    parser.add_argument(
        "--architecture", default="resnet18", metavar="NAME", help="of torchvision (default %(default)s)"
    )
    parser.add_argument(
        "--formats", default="onnx", metavar="LIST", help="as of an export (default %(default)s)"
    )
    parser.add_argument(
        "--size-px",
        type=int,
        default=224,
        metavar="N",
        help="side of the network's input (default %(default)s)",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `models`."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="repository to make")
    add_network_arguments(parser)
    parser.add_argument(
        "--max-batch",
        type=int,
        default=8,
        metavar="N",
        help="most tiles in one execution (default %(default)s)",
    )
    parser.add_argument(
        "--instances",
        type=int,
        default=cores(),
        metavar="N",
        help="executions of the first format at the same time (default: the cores of this machine)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the repository if it is there")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`models`; raises PerfError."""
    names = [name.strip() for name in options.formats.split(",") if name.strip()]
    if options.out.exists() and not options.overwrite:
        raise PerfInputError(f"{options.out} exists; name another directory, or --overwrite it.")
    classifiers = make_repository(
        options.out,
        options.architecture,
        names,
        size_px=options.size_px,
        max_batch=options.max_batch,
        instances=options.instances,
    )
    return {"repository": str(options.out), "architecture": options.architecture, "classifiers": classifiers}


def make_repository(
    directory: Path,
    architecture: str,
    format_names: Sequence[str],
    *,
    size_px: int = 224,
    max_batch: int = 8,
    instances: int = 2,
    tile_size_px: int = 512,
) -> dict[str, str]:
    """Write the repository, whole or not at all; returns the classifiers and their formats.

    Args:
        directory: what is there is replaced.
        architecture: name that `training.network.build` knows.
        format_names: keys of `exporters.formats.FORMATS`.
        size_px: side of the network's input.
        max_batch: most tiles in one execution.
        instances: executions of preprocessing at the same time, and of each network as far as it needs them
            (`exporters.cpu_layout`).
        tile_size_px: side of the tiles that clients are told to cut, and that INT8 is calibrated with.

    Raises:
        PerfInputError: an unknown architecture or format, or numbers out of range.
        PerfError: a format cannot be built here.
    """
    from exporters.errors import ExportError
    from training.errors import TrainingError

    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
    try:
        classifiers = _write(aside, architecture, format_names, size_px, max_batch, instances, tile_size_px)
        aside.chmod(0o755)
        if directory.exists():
            old = directory.with_name(f".{directory.name}.old-{os.getpid()}")
            directory.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        aside.rename(directory)
    except (ExportError, TrainingError) as error:
        raise (PerfInputError if isinstance(error, ValueError) else PerfError)(str(error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return classifiers


def _write(
    directory: Path,
    architecture: str,
    format_names: Sequence[str],
    size_px: int,
    max_batch: int,
    instances: int,
    tile_size_px: int,
) -> dict[str, str]:
    from exporters import triton_config
    from exporters.cpu_layout import cpu_layout, network_ms_of, preprocess_ms_of
    from exporters.formats import formats_named
    from exporters.network_work import network_work
    from exporters.serving_options import ServingOptions
    from slides.decode import MAX_TILE_BYTES, MAX_TILE_PIXELS

    formats = formats_named(format_names)
    for fmt in formats:
        fmt.require()
    ServingOptions(max_batch, instances)  # raises for numbers out of range
    spec = measured_spec(size_px, tile_size_px)
    network = _network(architecture, spec, max_batch)
    work = network_work(network.backbone, size_px)
    labels = triton_config.labels_text(spec.class_names)
    classifiers = {}
    for number, fmt in enumerate(formats):
        name = triton_config.CLASSIFIER_MODEL if number == 0 else fmt.classifier_name
        artifact = fmt.build(network)
        network_ms = network_ms_of(work, fmt.precision)
        layout = cpu_layout(instances, network_ms, preprocess_ms_of(spec), artifact.size_bytes)
        if number == 0:
            preprocess = triton_config.preprocess_config(
                input_size_px=size_px,
                max_batch=max_batch,
                instances=layout.preprocess_instances,
                max_tile_bytes=MAX_TILE_BYTES,
                max_tile_pixels=MAX_TILE_PIXELS,
            )
            _put(
                directory / preprocess.name,
                triton_config.to_text(preprocess),
                {"model.py": _preprocess_code()},
            )
        config = triton_config.network_config(
            fmt.model_name,
            backend=fmt.backend,
            platform=fmt.platform,
            artifact_filename=fmt.artifact_filename,
            tensors=fmt.tensors,
            parameters=layout.parameters(fmt.parameters),
            input_size_px=size_px,
            classes=len(CLASS_NAMES),
            max_batch=max_batch,
            instances=layout.instances,
            instance_kind="cpu",
            versions_loaded=1,
            gathered=layout.gathered,
            answers_for=(name, CLASS_NAMES),
        )
        _put(directory / config.name, triton_config.to_text(config), artifact.files, labels)
        ensemble = triton_config.classifier_config(
            name,
            network=config,
            tensors=fmt.tensors,
            network_version=1,
            preprocess_version=1,
            parameters={"clotline_spec": spec.to_json()},
        )
        _put(directory / name, triton_config.to_text(ensemble), {"random_weights": b""}, labels)
        classifiers[name] = fmt.name
    return classifiers


def _preprocess_code() -> bytes:
    root = Path(__file__).resolve().parent.parent
    return (root / "model_repository" / "tile_preprocess" / "1" / "model.py").read_bytes()


def measured_spec(size_px: int, tile_size_px: int) -> ModelSpec:
    """What a network that is only measured says of its tiles; raises SpecError for impossible numbers."""
    return ModelSpec(
        class_names=CLASS_NAMES,
        tile_size_px=tile_size_px,
        um_per_px=0.5,
        input_size_px=size_px,
        tiles_per_slide=16,
        min_tissue_share=0.3,
    )


def _network(architecture: str, spec: Any, max_batch: int) -> Network:
    import numpy as np
    import torch

    from exporters.formats.interface import Network
    from slides.decode import decode_tile
    from training import network as networks

    torch.manual_seed(0)
    model = networks.build(architecture, spec).eval()
    tiles_NHWC = np.stack(
        [
            decode_tile(tile, spec.input_size_px)
            for tile in benchmark_tiles(_CALIBRATION_TILES, spec.tile_size_px, seed=4)
        ]
    )
    tell_tiles_apart(model, torch.from_numpy(tiles_NHWC))
    return Network(
        model.backbone,
        spec.mean,
        spec.std,
        spec.input_size_px,
        max_batch=max_batch,
        calibration_NHWC=tiles_NHWC,
    )


def tell_tiles_apart(model: Any, tiles_NHWC: Any) -> None:
    """Spread the logits of a fresh network: answers that are all alike would hide a mix-up of requests."""
    import torch

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # the plain mean over all batches
        model.train()
        model(tiles_NHWC)
        model.eval()
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        if not linear:
            return
        last = linear[-1]
        logits_NK = model(tiles_NHWC)
        spread = (logits_NK - logits_NK.mean(dim=0)).std()
        last.weight.div_(spread)
        last.bias.copy_((last.bias - logits_NK.mean(dim=0)) / spread)


def _put(model: Path, config: str, version: Any, labels: str | None = None) -> None:
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(config, encoding="utf-8")
    if labels is not None:
        (model / "labels.txt").write_text(labels, encoding="utf-8")
    for filename, content in version.items():
        (model / "1" / filename).write_bytes(content)
