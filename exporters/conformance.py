"""python -m exporters.conformance [--architectures LIST] [--formats LIST] [--size-px N] [--max-batch N]

Passes networks with random weights through the parity gate in every format named: which architecture can be served how.
The last line of standard output is one JSON document; exit code 0 if all pairs pass, 1 if one does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ARCHITECTURES = ("resnet18", "resnet50", "efficientnet_b0", "convnext_tiny", "vit_b_16")
FORMATS = ("onnx", "torchscript")
TILES = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from tqdm import tqdm

    from exporters.errors import ExportError, FormatError
    from exporters.formats import formats_named
    from training.errors import TrainingError

    parsed = _parser().parse_args(arguments)
    names, architectures = parsed.formats.split(","), parsed.architectures.split(",")
    try:
        for fmt in formats_named(names):
            fmt.require()
        pairs = []
        for architecture in tqdm(architectures, unit="network", leave=False):
            pairs += _pairs(architecture, names, parsed.size_px, parsed.max_batch)
    except (FormatError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for pair in pairs:
        said = pair["refused"] or f"max |dp| {pair['max_abs_diff']:.2g} at batch {pair['batches']}"
        print(f"{pair['architecture']} as {pair['format']}: {said}", file=sys.stderr)
    passed = all(pair["refused"] is None for pair in pairs)
    print(json.dumps({"passed": passed, "pairs": pairs}, separators=(",", ":")))
    return 0 if passed else 1


def _pairs(architecture: str, names: Sequence[str], size_px: int, max_batch: int) -> list[dict[str, Any]]:
    import numpy as np
    import torch

    from exporters.errors import ExportError
    from exporters.formats import formats_named
    from exporters.formats.interface import Network
    from exporters.parity import check_parity, reference_answer
    from slides.spec import ModelSpec
    from training import network as networks

    spec = ModelSpec(
        class_names=("CE", "LAA"),
        tile_size_px=size_px,
        um_per_px=0.5,
        input_size_px=size_px,
        tiles_per_slide=1,
        min_tissue_share=0.0,
    )
    torch.manual_seed(0)
    model = networks.build(architecture, spec).eval()
    grid = np.random.default_rng(0).integers(0, 256, (TILES, 8, 8, 3), dtype=np.uint8)
    cell = -(-size_px // 8)
    tiles_NHWC = np.kron(grid, np.ones((1, cell, cell, 1), np.uint8))[:, :size_px, :size_px]
    _tell_tiles_apart(model, torch.from_numpy(np.ascontiguousarray(tiles_NHWC)))
    expected = reference_answer(model, tiles_NHWC)
    network = Network(model.backbone, spec.mean, spec.std, size_px, max_batch)
    pairs = []
    for fmt in formats_named(names):
        pair: dict[str, Any] = {"architecture": architecture, "format": fmt.name, "refused": None}
        try:
            artifact = fmt.build(network)
            with tempfile.TemporaryDirectory(prefix="clotline-conformance-") as directory:
                for filename, content in artifact.files.items():
                    Path(directory, filename).write_bytes(content)
                measured = check_parity(
                    fmt.name,
                    fmt.open(Path(directory, fmt.artifact_filename)),
                    tiles_NHWC,
                    expected,
                    max_batch=max_batch,
                    precision=fmt.precision,
                )
            pair |= {
                "max_abs_diff": measured.max_abs_diff,
                "batches": list(measured.batches),
                "bytes": artifact.size_bytes,
            }
        except ExportError as error:
            pair["refused"] = str(error)
        pairs.append(pair)
    return pairs


def _tell_tiles_apart(model: Any, tiles_NHWC: Any) -> None:
    """Give a fresh network statistics of its own and logits that differ: a constant answer would hide every fault."""
    import torch

    with torch.no_grad():
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # the plain mean over all batches
        for _ in range(2):
            model(tiles_NHWC)
        model.eval()
        last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
        torch.nn.init.normal_(last.weight, std=last.in_features**-0.5)  # ViT's begins with zeros
        logits_NK = model(tiles_NHWC)
        spread = (logits_NK - logits_NK.mean(dim=0)).std()
        last.weight.mul_(1.0 / spread)
        last.bias.copy_((last.bias - logits_NK.mean(dim=0)) / spread)


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
    return parser


if __name__ == "__main__":
    sys.exit(main())
