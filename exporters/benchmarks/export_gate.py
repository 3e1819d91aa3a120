"""python -m exporters.benchmarks export-gate [--size-px 224] [--formats onnx,torchscript] [--bar-s 60]

How long it takes to export a ResNet-18 with random weights as a release: both formats built, compared with PyTorch in
process and through a tritonserver over HTTP and gRPC, the server's start and end included. The command is run as a user
runs it, in a process of its own; where the time goes is told by its progress bar. Passed: within `--bar-s` seconds.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from exporters.errors import ExportError

_ARCHITECTURE = "resnet18"
_SHOWN = re.compile(r"(?:^|[\r\n])\s*([^\r\n]+?): +\[\d+:\d+\]")
"""The description before the time of a progress line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--size-px", type=int, default=224, metavar="N", help="side of the input")
    parser.add_argument("--formats", default="onnx,torchscript", metavar="LIST", help="as for `export`")
    parser.add_argument("--max-batch", type=int, default=8, metavar="N", help="most tiles in one execution")
    parser.add_argument(
        "--bar-s", type=float, default=60.0, metavar="S", help="seconds within which it passes"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Export once and say where the time went.

    Raises:
        ExportError: the export failed.
    """
    with tempfile.TemporaryDirectory(prefix="clotline-export-gate-") as scratch:
        checkpoint = _checkpoint(Path(scratch, "checkpoint"), options.size_px)
        command = [sys.executable, "-m", "exporters", "export", str(checkpoint)]
        command += ["--release", str(Path(scratch, "release")), "--formats", options.formats]
        command += ["--max-batch", str(options.max_batch)]
        started_s = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        assert process.stderr  # noqa: S101  opened above
        told, stages = [], [("imports", started_s)]
        try:
            for moment_s, text in _chunks(process.stderr):
                told.append(text)
                stages += [
                    (found, moment_s) for found in map(_stage, _SHOWN.findall(text)) if found != stages[-1][0]
                ]
            code = process.wait()
        except BaseException:  # Ctrl-C
            process.terminate()
            process.wait()
            raise
        ended_s = time.monotonic()
    if code != 0:
        raise ExportError(f"The export failed: {''.join(told).rpartition('error: ')[2].strip()}")
    wall_s = ended_s - started_s
    seconds: dict[str, float] = {}
    for (stage, begun_s), (_, next_s) in zip(stages, [*stages[1:], ("", ended_s)], strict=True):
        seconds[stage] = seconds.get(stage, 0.0) + next_s - begun_s
    return {
        "benchmark": "export-gate",
        "passed": wall_s <= options.bar_s,
        "wall_s": round(wall_s, 2),
        "bar_s": options.bar_s,
        "architecture": _ARCHITECTURE,
        "size_px": options.size_px,
        "formats": options.formats.split(","),
        "cores": os.cpu_count(),
        "seconds": {stage: round(took_s, 2) for stage, took_s in seconds.items()},
        "exit_code": 0 if wall_s <= options.bar_s else 1,
    }


def _chunks(stream: IO[bytes]) -> Iterator[tuple[float, str]]:
    """What a process writes, with the moment at which it came."""
    while content := os.read(stream.fileno(), 65536):
        yield time.monotonic(), content.decode(errors="replace")


def _stage(description: str) -> str:
    """``tile_classifier over http: batch 1, tile 0 of 16`` is a stage without its batches."""
    model, over, rest = description.partition(" over ")
    return f"{model} over {rest.partition(':')[0]}" if over else description


def _checkpoint(directory: Path, size_px: int) -> Path:
    """A checkpoint with random weights, and 16 golden tiles of 8 patients."""
    from exporters.conformance import random_network, synthetic_tiles, tile_spec
    from training import checkpoint

    spec, tiles = tile_spec(size_px), synthetic_tiles(size_px)
    network = random_network(_ARCHITECTURE, spec, tiles)
    golden = [
        checkpoint.GoldenTile(
            image_id=f"p{number % 8}_0",
            label=spec.class_names[number % 2],
            data=tile.data,
            probabilities=(0.5, 0.5),
        )
        for number, tile in enumerate(tiles.encoded)
    ]
    return checkpoint.save(
        directory,
        network,
        spec,
        architecture=_ARCHITECTURE,
        metrics={},
        data={"fingerprint": "0" * 64, "slides": 8, "patients": 8, "held_out_patients": []},
        golden_tiles=golden,
    )
