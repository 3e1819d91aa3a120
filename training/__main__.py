"""python -m training COMMAND

Slides to a tile store, patients to folds, runs to ensembles and reports. Training itself is
`accelerate launch training/train.py`. The last line of stdout is one JSON document; `COMMAND --help` says more.
"""

from __future__ import annotations

import os
import sys

from training.commands import Command, main

COMMANDS = {
    "tile": Command("training.store.command", "cut slides into a tile store"),
    "folds": Command("training.folds_command", "deal patients into folds, saved as a file"),
    "cross-validate": Command("training.cross_validation", "train and score every fold"),
    "ensemble": Command("training.ensembles.command", "join out-of-fold predictions into one"),
    "evaluate": Command("training.evaluation.command", "report.html with plots for checkpoints"),
    "promote": Command("training.tracking.promote", "move an alias of the model registry"),
    "sync": Command("training.tracking.sync", "send locally kept records of a run to MLflow"),
}

if __name__ == "__main__":
    # Threads that wait for work by spinning lose a factor of three as soon as something else wants a core as well.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded
    sys.exit(main("python -m training", __doc__, COMMANDS))
