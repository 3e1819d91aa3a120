"""python -m training.benchmarks resume

Exact resume: training is started through `accelerate launch`, killed with SIGKILL (launcher and all processes) at
random moments of random epochs, and started again with the same command. The weights that come out are compared with
those of an uninterrupted training. With BatchNorm, dropout, mixup, averaged weights, early stopping, accumulation with
a leftover window, and workers that load.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import safetensors.torch
import torch

from training import recipe
from training.benchmarks import material
from training.errors import TrainingError

_POSITION = re.compile(r"epoch (\d+)/\d+: [^\r\n]*?\| (\d+)/(\d+) \[")
EXACT = {
    "architecture": "mobilenet_v3_small",  # BatchNorm and dropout
    "epochs": 4,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "mixup_alpha": 0.4,
    "ema_decay": 0.9,
    "validation_share": 0.25,
    "early_stopping_patience": 3,
    "warmup_share": 0.1,
    "workers": 1,
    "save_every_s": 0.3,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument(
        "--kills", type=int, default=3, help="trainings that are killed once each (default: 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments of killing (default: 0)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Bar: the largest difference of any weight is 0."""
    generator = random.Random(options.seed)  # noqa: S311 - moments, not secrets
    outcomes: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = material.make_tiles(folder / "data", patients=42, tiles_a_patient=4, side_px=32)
        plan = material.make_recipe(side_px=32, **EXACT)
        for processes in options.processes:
            outcomes += compare(plan, data, folder / f"{processes}", processes, options.kills, generator)
    differences = [outcome["max_abs_diff"] for outcome in outcomes]
    return {
        "benchmark": "resume",
        "passed": max(differences) == 0,
        "max_abs_diff": max(differences),
        "kills": outcomes,
        "cores": os.cpu_count(),
    }


def compare(
    plan: recipe.Recipe, data: Path, folder: Path, processes: int, kills: int, generator: random.Random
) -> list[dict[str, Any]]:
    """One uninterrupted training, and `kills` that are killed once and resumed; one row each of the latter."""
    folder.mkdir(parents=True)
    recipe_file = material.write_recipe(plan, folder / "recipe.toml")

    def command(out: Path) -> list[str]:
        return material.training_command(processes, "--recipe", recipe_file, "--data", data, "--out", out)

    finish(command(folder / "whole"))
    whole = weights(folder / "whole")
    rows = []
    for number in range(kills):
        out = folder / f"killed {number}"
        target = generator.uniform(0.15, 0.95) * plan.epochs
        killed_at = kill_at(command(out), target, plan.epochs, generator.uniform(0, 0.3))
        saved = sorted(path.name for path in (out / "state").glob("save-*"))
        said = finish(command(out))
        resumed = weights(out)
        difference = max(
            float((resumed[name].double() - value.double()).abs().max()) for name, value in whole.items()
        )
        told = re.search(r"going on in epoch (\d+) of \d+, batch (\d+)", said)
        rows.append(
            {
                "processes": processes,
                "killed_at": killed_at,
                "resumed_at": f"epoch {told[1]}, batch {told[2]}" if told else "the start",
                "saves": len(saved),
                "max_abs_diff": difference,
                "tables_equal": (out / "held_out.csv").read_bytes()
                == (folder / "whole" / "held_out.csv").read_bytes(),
            }
        )
    return rows


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The weights that a training left behind."""
    return safetensors.torch.load_file(out / "checkpoint" / "model.safetensors")


def finish(command: list[str]) -> str:
    """Run to the end; returns what was said on stderr."""
    done = subprocess.run(
        command, env=material.quiet_environment(), capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise TrainingError(f"training failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stderr


def kill_at(command: list[str], target: float, epochs: int, delay_s: float) -> str:
    """Start, and SIGKILL everything `delay_s` after `target` epochs are done; returns where that was."""
    process = subprocess.Popen(
        command, env=material.quiet_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    said, position = bytearray(), (0.0, "the start")
    ended = threading.Event()

    def listen() -> None:
        while process.stderr is not None and (piece := os.read(process.stderr.fileno(), 4096)):
            said.extend(piece)
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    while not ended.is_set() and position[0] < target:
        time.sleep(0.005)
        position = _position(bytes(said).decode(errors="replace"))
    time.sleep(delay_s)
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()
    ended.wait(30)
    if position[0] < target:
        raise TrainingError(
            f"training ended before it was killed: {bytes(said[-3000:]).decode(errors='replace')}"
        )
    return _position(bytes(said).decode(errors="replace"))[1]


def _position(said: str) -> tuple[float, str]:
    """(epochs done, as words) of the last progress that was shown."""
    shown = _POSITION.findall(said)
    if not shown:
        return 0.0, "the start"
    epoch, batch, batches = map(int, shown[-1])
    return epoch - 1 + batch / batches, f"epoch {epoch}, batch {batch} of {batches}"
