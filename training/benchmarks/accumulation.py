"""python -m training.benchmarks accumulation

Four batches of 8 against one batch of 32: gradients after clipping and weights at the end of an epoch, with class
weights and label smoothing, with a last window that is not full; in one process and in two (2 x 4 x 4).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from training import recipe
from training.benchmarks import material
from training.errors import TrainingError

LARGEST_DIFFERENCE = 1e-6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Bar: 1e-6, by the gradients and by the weights."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        data = material.make_tiles(Path(scratch) / "data", patients=51, tiles_a_patient=7, side_px=48)
        for processes in options.processes:
            plan = material.make_recipe(
                side_px=48,
                architecture="resnet18",  # not used: `gradients` has a network of its own
                epochs=1,
                batch_size=8 // processes,
                gradient_accumulation_steps=4,
                label_smoothing=0.1,
                max_gradient_norm=0.25,
                # AdamW divides a gradient by its own size: rounding, of any gradient, is learnt from as fast as this.
                learning_rate=1e-4,
                warmup_share=0.0,
            )
            rows.append(differences(plan, data, processes, Path(scratch) / f"{processes}.toml"))
    worst = max(max(row["gradient"], row["weights"]) for row in rows)
    whole = all(max(row["items"]) == 32 and row["items"][-1] < 32 and row["clipped"] for row in rows)
    return {
        "benchmark": "accumulation",
        "passed": worst <= LARGEST_DIFFERENCE and whole,
        "max_abs_diff": worst,
        "windows": rows,
        "cores": os.cpu_count(),
    }


def differences(plan: recipe.Recipe, data: Path, processes: int, recipe_file: Path) -> dict[str, Any]:
    """What `training.benchmarks.gradients` says, run with so many processes."""
    material.write_recipe(plan, recipe_file)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
    ]
    command += ["-m", "training.benchmarks.gradients", "--data", str(data), "--recipe", str(recipe_file)]
    done = subprocess.run(
        command, env=material.quiet_environment(), capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise TrainingError(f"training.benchmarks.gradients failed:\n{done.stderr[-3000:]}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told
