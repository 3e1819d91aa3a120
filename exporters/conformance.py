"""python -m exporters.conformance [--architectures LIST] [--formats LIST] [--size-px N] [--max-batch N]

Passes networks with random weights through the parity gate in every format named, in this process and through one
tritonserver over HTTP and gRPC: which architecture can be served how. The last line of standard output is one JSON
document; exit code 0 if all pairs pass, 1 if one does not, 2 for a request that cannot be fulfilled.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.comparison_tiles import ComparisonTiles
    from exporters.formats.interface import Answer, ServedFormat
    from exporters.publication import Publication
    from exporters.serving_options import ServingOptions
    from slides.spec import ModelSpec

ARCHITECTURES = ("resnet18", "resnet50", "efficientnet_b0", "convnext_tiny", "vit_b_16")
FORMATS = ("onnx", "torchscript")
TILES = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    from exporters.errors import ExportError
    from exporters.interruption import interruptible
    from training.errors import TrainingError

    started_s = time.monotonic()
    try:
        with interruptible():
            pairs = _all_pairs(parsed)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ExportError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (ValueError, TrainingError)) else 1
    for pair in pairs:
        print(f"{pair['architecture']} as {pair['format']}: {_in_words(pair)}", file=sys.stderr)
    passed = all(pair["refused"] is None for pair in pairs)
    document = {"passed": passed, "wall_s": round(time.monotonic() - started_s, 2), "pairs": pairs}
    print(json.dumps(document, separators=(",", ":")))
    return 0 if passed else 1


def _in_words(pair: Mapping[str, Any]) -> str:
    if pair["refused"] is not None:
        return str(pair["refused"])
    served = pair["served"]
    through = (
        f", over HTTP {served['http']:.2g}, over gRPC {served['grpc']:.2g}" if served else ", no server asked"
    )
    return f"max |dp| {pair['max_abs_diff']:.2g} in process{through} at batch {pair['batches']}"


def _all_pairs(parsed: argparse.Namespace) -> list[dict[str, Any]]:
    """Every pair's figures, or why it is refused."""
    from tqdm import tqdm

    from exporters.formats import formats_named
    from exporters.parity import reference_answer
    from exporters.publication import Publication
    from exporters.serving_options import ServingOptions
    from exporters.target_repository import stage_preprocess

    formats, architectures = formats_named(parsed.formats.split(",")), parsed.architectures.split(",")
    for fmt in formats:
        fmt.require()
    options = ServingOptions(max_batch=parsed.max_batch, instances=1)
    spec, tiles = tile_spec(parsed.size_px), synthetic_tiles(parsed.size_px)
    pairs = []
    waiting: dict[str, tuple[ServedFormat, Answer, dict[str, Any]]] = {}
    with (
        tqdm(total=len(architectures) * len(formats) + 1, unit="step", leave=False) as progress,
        tempfile.TemporaryDirectory(prefix="clotline-conformance-") as scratch,
        Publication(_made(Path(scratch, "models"))) as publication,  # staged, and never published
    ):
        version = stage_preprocess(publication, Path(scratch, "models"), spec.input_size_px, options)
        for architecture in architectures:
            model = random_network(architecture, spec, tiles)
            expected = reference_answer(model, tiles.tiles_NHWC)
            for fmt in formats:
                progress.set_description(f"{architecture} as {fmt.name}")
                name = f"{architecture}_{fmt.name.replace('-', '_')}"
                pair = _in_process(model, expected, fmt, name, spec, tiles, options, publication, version)
                pairs.append({"architecture": architecture, "format": fmt.name, **pair})
                if pair["refused"] is None and not parsed.without_server:
                    waiting[name] = (fmt, expected, pairs[-1])
                progress.update()
        if waiting:
            _through_a_server(publication.root, waiting, spec, tiles, options, progress.set_description)
        progress.update()
    return pairs


def _in_process(
    model: Any,
    expected: Answer,
    fmt: ServedFormat,
    name: str,
    spec: ModelSpec,
    tiles: ComparisonTiles,
    options: ServingOptions,
    publication: Publication,
    preprocess_version: int,
) -> dict[str, Any]:
    """Build a pair, compare it in this process, and stage the ensemble `name` for the server."""
    from exporters.errors import ExportError
    from exporters.formats.interface import Network
    from exporters.parity import check_parity

    network = Network(model.backbone, spec.mean, spec.std, spec.input_size_px, options.max_batch)
    pair: dict[str, Any] = {"refused": None}
    try:
        artifact = fmt.build(network)
        stage_classifier(
            publication, name, fmt, artifact.files, spec, options, preprocess_version=preprocess_version
        )
        path = publication.staged(f"{name}_network/1/{fmt.artifact_filename}")
        measured = check_parity(
            fmt.name,
            fmt.open(path),
            tiles.tiles_NHWC,
            expected,
            max_batch=options.max_batch,
            precision=fmt.precision,
        )
        pair |= {
            "max_abs_diff": measured.max_abs_diff,
            "batches": list(measured.batches),
            "bytes": artifact.size_bytes,
            "served": None,
        }
    except ExportError as error:
        pair["refused"] = str(error)
    return pair


def _through_a_server(
    models: Path,
    waiting: Mapping[str, tuple[ServedFormat, Answer, dict[str, Any]]],
    spec: ModelSpec,
    tiles: ComparisonTiles,
    options: ServingOptions,
    announce: Callable[[str], object],
) -> None:
    """Add to each pair what one tritonserver over all of them answers."""
    from exporters.errors import ParityError, ServedError
    from exporters.proving_server import proving_server, unservable_here
    from exporters.served_parity import check_served_on

    for _, (fmt, _, pair) in waiting.items():
        pair["refused"] = unservable_here(fmt)
    names = [name for name, (_, _, pair) in waiting.items() if pair["refused"] is None]
    if not names:
        return
    with proving_server(models, names, announce=announce) as server:
        for name in names:
            fmt, expected, pair = waiting[name]
            try:
                served = check_served_on(
                    server,
                    {name: fmt},
                    tiles,
                    expected,
                    spec=spec,
                    max_batch=options.max_batch,
                    announce=announce,
                )[name]
            except ServedError:
                raise
            except ParityError as error:
                pair["refused"] = str(error)
            else:
                pair["served"] = {"http": served.http.max_abs_diff, "grpc": served.grpc.max_abs_diff}


def stage_classifier(
    publication: Publication,
    name: str,
    fmt: ServedFormat,
    files: Mapping[str, bytes],
    spec: ModelSpec,
    options: ServingOptions,
    *,
    preprocess_version: int,
) -> None:
    """Stage the ensemble `name` and the network behind it, `<name>_network`, as an export would.

    Args:
        files: of the version directory.
        preprocess_version: of `tile_preprocess`, which is staged already.
    """
    from exporters.triton_config import (
        CONFIG_FILENAME,
        LABELS_FILENAME,
        classifier_config,
        labels_text,
        network_config,
        to_text,
    )

    network = network_config(
        f"{name}_network",
        backend=fmt.backend,
        platform=fmt.platform,
        artifact_filename=fmt.artifact_filename,
        tensors=fmt.tensors,
        parameters=fmt.parameters,
        input_size_px=spec.input_size_px,
        classes=len(spec.class_names),
        max_batch=options.max_batch,
        instances=options.instances,
        instance_kind=options.instance_kind,
        versions_loaded=1,
    )
    ensemble = classifier_config(
        name,
        network=network,
        tensors=fmt.tensors,
        network_version=1,
        preprocess_version=preprocess_version,
        parameters={"clotline_spec": spec.to_json()},
    )
    for config in (network, ensemble):
        publication.stage(f"{config.name}/{CONFIG_FILENAME}", to_text(config).encode())
        publication.stage(f"{config.name}/{LABELS_FILENAME}", labels_text(spec.class_names).encode())
    publication.stage(f"{name}/1/empty", b"")  # Triton wants the version directory of an ensemble
    for filename, content in files.items():
        publication.stage(f"{network.name}/1/{filename}", content)


def tile_spec(size_px: int) -> ModelSpec:
    from slides.spec import ModelSpec

    return ModelSpec(
        class_names=("CE", "LAA"),
        tile_size_px=size_px,
        um_per_px=0.5,
        input_size_px=size_px,
        tiles_per_slide=1,
        min_tissue_share=0.0,
    )


def synthetic_tiles(size_px: int) -> ComparisonTiles:
    """Blotches, as JPEG and decoded as the server does."""
    import numpy as np

    from exporters.comparison_tiles import ComparisonTiles, EncodedTile, Truth, decode_tiles
    from slides.decode import encode_tile

    grid = np.random.default_rng(0).integers(0, 256, (TILES, 8, 8, 3), dtype=np.uint8)
    cell = -(-size_px // 8)
    drawn = np.kron(grid, np.ones((1, cell, cell, 1), np.uint8))[:, :size_px, :size_px]
    encoded = tuple(
        EncodedTile(f"tile {number}", encode_tile(np.ascontiguousarray(tile), 90))
        for number, tile in enumerate(drawn)
    )
    unknown = (None,) * TILES
    truth = Truth(("CE", "LAA"), unknown, unknown, unknown)
    return ComparisonTiles(decode_tiles(encoded, size_px), truth, encoded)


def random_network(architecture: str, spec: ModelSpec, tiles: ComparisonTiles) -> Any:
    """A network with random weights whose answers tell tiles apart."""
    import torch

    from training import network as networks

    torch.manual_seed(0)
    model = networks.build(architecture, spec).eval()
    _tell_tiles_apart(model, torch.from_numpy(tiles.tiles_NHWC))
    return model


def _tell_tiles_apart(model: Any, tiles_NHWC: Any) -> None:
    """Give a fresh network statistics of its own and logits that differ: a constant answer would hide every fault."""
    import torch

    from exporters.errors import FormatError

    with torch.no_grad():
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # the plain mean over all batches
        for _ in range(2):
            model(tiles_NHWC)
        model.eval()
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        if not linear:
            raise FormatError(
                f"{type(model.backbone).__name__} does not end in a linear layer; choose another network."
            )
        last = linear[-1]
        torch.nn.init.normal_(last.weight, std=last.in_features**-0.5)  # ViT's begins with zeros
        logits_NK = model(tiles_NHWC)
        spread = (logits_NK - logits_NK.mean(dim=0)).std()
        last.weight.mul_(1.0 / spread)
        last.bias.copy_((last.bias - logits_NK.mean(dim=0)) / spread)


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m exporters.conformance",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--architectures",
        default=",".join(ARCHITECTURES),
        metavar="LIST",
        help="of torchvision, comma-separated",
    )
    parser.add_argument(
        "--formats", default=",".join(FORMATS), metavar="LIST", help="FP32 formats, comma-separated"
    )
    parser.add_argument("--size-px", type=int, default=224, metavar="N", help="side of the input")
    parser.add_argument("--max-batch", type=int, default=16, metavar="N", help="largest batch compared")
    parser.add_argument(
        "--without-server",
        action="store_true",
        help="compare in this process only, not through a tritonserver",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
