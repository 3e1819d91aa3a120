"""python -m training.benchmarks NAME

Each benchmark measures a part of the training library and the limit that it is held against in the same run. The last
line of stdout is one JSON document with `benchmark`, `passed` and the figures; `NAME --help` says what is measured.
"""

from __future__ import annotations

import os
import sys

from training.commands import Command, main

BENCHMARKS = {
    "tiling": Command(
        "training.benchmarks.tiling", "tiles/s of the store's writer against a bare reading loop"
    ),
    "containers": Command(
        "training.benchmarks.containers", "reads of tiles from Arrow, Parquet, files, tar, SQLite"
    ),
    "step": Command("training.benchmarks.step", "the trainer against a bare PyTorch loop"),
    "input-pipeline": Command("training.benchmarks.input_pipeline", "tiles/s of the loader against the step"),
    "accumulation": Command(
        "training.benchmarks.accumulation", "accumulated gradients against one large batch"
    ),
    "resume": Command("training.benchmarks.resume", "kill -9 and resume against an uninterrupted run"),
    "processes": Command("training.benchmarks.processes", "two processes against one"),
    "weak-labels": Command("training.benchmarks.weak_labels", "multiple-instance learning on photographs"),
    "stacking-noise": Command("training.benchmarks.stacking_noise", "stacking of pure noise has AUC 0.5"),
}

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded
    sys.exit(main("python -m training.benchmarks", __doc__, BENCHMARKS))
