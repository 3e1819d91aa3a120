"""python -m training.benchmarks processes

Two processes on two cores against one process on one of them: gradients of the joined batch, and images/s of
training/train.py as it is launched, each process with one thread. Runs of the two take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.benchmarks import material
from training.benchmarks.accumulation import LARGEST_DIFFERENCE, differences
from training.errors import TrainingError
from training.processes import usable_cores

LEAST_SPEEDUP = 1.6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--architecture", default="resnet18", help="default: %(default)s")
    parser.add_argument(
        "--side-px", type=int, default=96, metavar="PX", help="of the tiles (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="a process (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=2, metavar="N", help="runs of each (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Bars: gradients equal to 1e-6, and 1.6 times the images/s."""
    if usable_cores() < 2:
        raise TrainingError("two processes need two cores, this machine has one")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        small = material.make_tiles(folder / "small", patients=48, tiles_a_patient=6, side_px=48)
        joined = material.make_recipe(
            side_px=48,
            architecture="resnet18",  # not used: `gradients` has a network of its own
            epochs=1,
            batch_size=16,
            learning_rate=1e-4,
            label_smoothing=0.1,
        )
        same = differences(joined, small, 2, folder / "joined.toml")
        data = material.make_tiles(folder / "data", patients=60, tiles_a_patient=8, side_px=options.side_px)
        plan = material.make_recipe(
            side_px=options.side_px,
            architecture=options.architecture,
            epochs=3,
            batch_size=options.batch_size,
        )
        recipe_file = material.write_recipe(plan, folder / "speed.toml")
        rates: dict[int, list[float]] = {1: [], 2: []}
        for number in tqdm(range(options.repeats), desc="runs", file=sys.stderr):
            for processes, rate in rates.items():
                rate.append(images_per_s(recipe_file, data, folder / f"{number} {processes}", processes))
    one, two = statistics.median(rates[1]), statistics.median(rates[2])
    worst = max(same["gradient"], same["weights"])
    return {
        "benchmark": "processes",
        "passed": worst <= LARGEST_DIFFERENCE and two >= LEAST_SPEEDUP * one,
        "speedup": round(two / one, 3),
        "one_process_images_per_s": round(one, 1),
        "two_processes_images_per_s": round(two, 1),
        "gradient_max_abs_diff": same["gradient"],
        "weights_max_abs_diff": same["weights"],
        "architecture": options.architecture,
        "side_px": options.side_px,
        "batch_size": options.batch_size,
        "cores": os.cpu_count(),
    }


def images_per_s(recipe_file: Path, data: Path, out: Path, processes: int) -> float:
    """Of the epochs after the first, as history.json has it; each process has a core of its own."""
    cores = sorted(os.sched_getaffinity(0))[:processes]
    command = material.training_command(processes, "--recipe", recipe_file, "--data", data, "--out", out)
    done = subprocess.run(
        command,
        env=material.quiet_environment(),
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        raise TrainingError(f"training failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    history = json.loads((out / "history.json").read_text())
    return statistics.median(entry["images_per_s"] for entry in history[1:])
