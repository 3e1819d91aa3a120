"""Returns every input it gets, unchanged. `serving up` sends one array a dtype through it before it says "ready".

Triton's Python stub of 2.51 hands over zeros in place of numbers when it runs with NumPy 2, without an error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Identity."""

    def initialize(self, args: dict[str, str]) -> None:
        """Write down which NumPy the stubs run with: the launcher names it if the proof fails."""
        report = os.environ.get("CLOTLINE_PROOF_REPORT")
        if report:
            facts = {
                "numpy": numpy.__version__,
                "numpy_path": str(numpy.__path__[0]),
                "python": sys.version.split()[0],
            }
            Path(report).write_text(json.dumps(facts))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request with its own inputs, renamed from IN_<dtype> to OUT_<dtype>."""
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor("OUT" + t.name()[2:], t.as_numpy().copy()) for t in request.inputs()]
            )
            for request in requests
        ]
