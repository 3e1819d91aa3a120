"""python -m exporters.benchmarks NAME

Each benchmark measures a part of the exporters and says whether it is within its bar. The last line of stdout is one
JSON document with `benchmark`, `passed` and the figures; `NAME --help` says what is measured.
"""

from __future__ import annotations

import sys

from exporters.__main__ import exit_code_of
from training.commands import Command, main

BENCHMARKS = {
    "int8": Command(
        "exporters.benchmarks.int8", "INT8 against FP32: speed, labels, AUC, of a trained ResNet-18"
    ),
    "drift": Command(
        "exporters.benchmarks.drift",
        "drift alerts of a real server and Prometheus: quiet, and fired by a stain",
    ),
    "export-gate": Command("exporters.benchmarks.export_gate", "seconds of an export with all of its gate"),
}

if __name__ == "__main__":
    sys.exit(
        main(
            "python -m exporters.benchmarks",
            __doc__,
            BENCHMARKS,
            exit_code_of=exit_code_of,
            extras="export,track",
        )
    )
