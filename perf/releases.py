"""python -m perf release --out runs/bars/release_0 --architecture resnet18

Makes a Release to measure with, by the real exporter: a network of torchvision with random weights becomes a Checkpoint,
and `python -m exporters export` makes tile_classifier and slide_classifier of it. --bias is added to the first class's logit,
so that releases of different bias give different answers. What it classifies is worth nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from perf.errors import PerfError, PerfInputError
from perf.machine import cores
from perf.models import CLASS_NAMES, add_network_arguments, measured_spec, tell_tiles_apart
from perf.tiles import benchmark_tiles

GOLDEN_TILES = 16
_TILE_SIZE_PX = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `release`."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="release to make")
    add_network_arguments(parser)
    parser.add_argument(
        "--bias", type=float, default=0.0, metavar="X", help="tells it from others (default %(default)g)"
    )
    parser.add_argument(
        "--instances", type=int, default=cores(), metavar="N", help="of the network (default: the cores)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`release`; raises PerfError."""
    if options.out.exists():
        raise PerfInputError(f"{options.out} exists; name another directory.")
    make_release(
        options.out,
        options.architecture,
        formats=options.formats,
        size_px=options.size_px,
        bias=options.bias,
        instances=options.instances,
    )
    return {"release": str(options.out), "architecture": options.architecture, "bias": options.bias}


def make_release(
    directory: Path,
    architecture: str,
    *,
    formats: str = "onnx",
    size_px: int = 224,
    bias: float = 0.0,
    instances: int | None = None,
) -> None:
    """Write a release, whole or not at all.

    Args:
        directory: must not exist.
        architecture: name that `training.network.build` knows.
        formats: as of an export.
        size_px: side of the network's input.
        bias: added to the logit of the first class.
        instances: executions of the network at the same time; None: the cores of this machine.

    Raises:
        PerfInputError: an unknown architecture or impossible number.
        PerfError: the export failed; with its own error.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="clotline-release-", dir=directory.parent) as scratch:
        checkpoint = _random_checkpoint(Path(scratch), architecture, size_px, bias)
        command = [sys.executable, "-m", "exporters", "export", str(checkpoint), "--release", str(directory),
                   "--formats", formats, "--instances", str(instances or cores()), "--without-server"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
        if done.returncode:
            told = done.stderr.strip().rpartition("error: ")[2] or "it said nothing"
            raise PerfError(f"the export failed: {told}")


def _random_checkpoint(scratch: Path, architecture: str, size_px: int, bias: float) -> Path:
    import numpy as np
    import torch

    from slides.decode import decode_tile
    from slides.errors import SpecError
    from training import checkpoint, network
    from training.errors import TrainingError

    tiles = benchmark_tiles(GOLDEN_TILES, _TILE_SIZE_PX, seed=5)
    torch.manual_seed(0)
    try:
        spec = measured_spec(size_px, _TILE_SIZE_PX)
        model = network.build(architecture, spec).eval()
    except (TrainingError, SpecError) as error:
        raise PerfInputError(str(error)) from error
    tiles_NHWC = torch.from_numpy(np.stack([decode_tile(tile, size_px) for tile in tiles]))
    tell_tiles_apart(model, tiles_NHWC)
    with torch.inference_mode():
        last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
        last.bias[0] += bias
        probabilities_NK = torch.softmax(model(tiles_NHWC), dim=1).tolist()
    golden = [
        checkpoint.GoldenTile(
            image_id=f"made-up-{number}_0",
            label=CLASS_NAMES[number % len(CLASS_NAMES)],
            data=tile,
            probabilities=tuple(row),
        )
        for number, (tile, row) in enumerate(zip(tiles, probabilities_NK, strict=True))
    ]
    return checkpoint.save(
        scratch / "checkpoint",
        model,
        spec,
        architecture=architecture,
        metrics={},
        data={
            "fingerprint": "0" * 64,
            "slides": GOLDEN_TILES,
            "patients": GOLDEN_TILES,
            "held_out_patients": [],
        },
        golden_tiles=golden,
    )
