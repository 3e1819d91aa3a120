"""python -m exporters.benchmarks int8 [--data ../shared/bccd] [--checkpoint DIR --tiles DIR]

A ResNet-18 that tells white blood cells from red ones, trained here by the recipe `bccd` (half a minute) or given, as onnx and
openvino in FP32 and INT8: each INT8 format passes the parity gate on held-out photographs, and is timed turn by turn
with FP32 of its own runtime, one thread, at batch 1 and 8. Passed: every gate, and `onnx-int8` at least three times as fast at both
batch sizes where the CPU has VNNI. Ratios on a busy machine are worth little.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from exporters.errors import ExportError, ParityError

PAIRS = (("onnx", "onnx-int8"), ("openvino", "openvino-int8"))
BATCHES = (1, 8)
LEAST_RATIO = 3.0
_ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--data, --checkpoint and --tiles."""
    parser.add_argument(
        "--data",
        type=Path,
        default=_ROOT.parent / "shared" / "bccd",
        metavar="DIR",
        help="BCCD: boxes.csv and images/ (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="a trained tile checkpoint, in place of training one"
    )
    parser.add_argument(
        "--tiles", type=Path, metavar="DIR", help="the data set of tiles that --checkpoint was trained on"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train, export and time; raises the errors of `training` and `exporters`."""
    from exporters.formats.onnx_int8 import has_vnni

    with tempfile.TemporaryDirectory(prefix="clotline-int8-bench-") as scratch:
        tiles = options.tiles or _tiles(options.data, Path(scratch, "tiles"))
        checkpoint = options.checkpoint or _trained(tiles, Path(scratch, "run"))
        formats = _measured(checkpoint, tiles, Path(scratch))
    vnni = has_vnni()
    ratios = [formats["onnx-int8"].get(f"ratio_batch_{batch}", 0.0) for batch in BATCHES]
    passed = all(entry["refused"] is None for entry in formats.values())
    return {
        "benchmark": "int8",
        "passed": passed and (not vnni or min(ratios) >= LEAST_RATIO),
        "vnni": vnni,
        "least_ratio": LEAST_RATIO,
        "formats": formats,
    }


def _tiles(bccd: Path, out: Path) -> Path:
    from training.benchmarks.blood_cells import make_bccd_tiles

    return make_bccd_tiles(out, bccd_dir=bccd)


def _trained(tiles: Path, out: Path) -> Path:
    """A checkpoint of the recipe `bccd`; raises ExportError with the last line of what training said."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launch, str(_ROOT / "training" / "train.py"), "--recipe", "bccd"]
    command += ["--data", str(tiles), "--out", str(out), "--track", "none"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=_ROOT, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing was said"]
        raise ExportError(f"the network could not be trained: {said[0]}")
    return out / "checkpoint"


def _measured(checkpoint_dir: Path, tiles_source: Path, scratch: Path) -> dict[str, dict[str, Any]]:
    from tqdm import tqdm

    from exporters.acceptance import machine_name, measure_speed
    from exporters.comparison_tiles import calibration_tiles, comparison_tiles
    from exporters.formats import formats_named
    from exporters.formats.interface import Network
    from exporters.parity import check_parity, reference_answer
    from training.checkpoint import load

    checkpoint = load(checkpoint_dir)
    spec, tiles = checkpoint.spec, comparison_tiles(checkpoint, tiles_source)
    calibration_NHWC = calibration_tiles(checkpoint, tiles_source)
    network = Network(
        checkpoint.model.backbone, spec.mean, spec.std, spec.input_size_px, max(BATCHES), calibration_NHWC
    )
    expected = reference_answer(checkpoint.model, tiles.tiles_NHWC)
    found: dict[str, dict[str, Any]] = {}
    runners: dict[str, Any] = {}
    for fmt in tqdm(formats_named([name for pair in PAIRS for name in pair]), unit="format", leave=False):
        fmt.require()
        artifact = fmt.build(network)
        directory = scratch / fmt.name
        directory.mkdir()
        for filename, content in artifact.files.items():
            (directory / filename).write_bytes(content)
        runners[fmt.name] = fmt.open(directory / fmt.artifact_filename)
        entry: dict[str, Any] = {"bytes": artifact.size_bytes, "refused": None}
        found[fmt.name] = entry
        try:
            measured = check_parity(
                fmt.name,
                runners[fmt.name],
                tiles.tiles_NHWC,
                expected,
                max_batch=max(BATCHES),
                precision=fmt.precision,
                truth=tiles.truth,
            )
        except ParityError as error:
            entry["refused"] = str(error)
            continue
        entry |= {
            "tiles": measured.tiles,
            "patients": measured.patients,
            "max_abs_diff": measured.max_abs_diff,
            "label_flips": measured.label_flips,
            "patient_auc": measured.patient_auc,
        }
    for fp32, int8 in PAIRS:
        for batch in BATCHES:
            speed = measure_speed(
                [runners[int8], runners[fp32]], tiles.tiles_NHWC, batch=batch, machine=machine_name()
            )
            found[int8][f"images_per_s_batch_{batch}"] = speed.images_per_s
            found[fp32][f"images_per_s_batch_{batch}"] = speed.fp32_images_per_s
            found[int8][f"ratio_batch_{batch}"] = round(speed.ratio or 0.0, 2)
    return found
