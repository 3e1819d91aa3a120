"""A classifier's answers in, the same out, counted: the last step of an ensemble whose network's backend counts nothing.

inputs and outputs  `probabilities` FP32 [K], `confidence` FP32 [1], `label_index` INT64 [1]

Parameter (config.pbtxt, written by `serving.releases.counting`): `clotline_answers_for`, see `slides.model_metrics`.
"""

from __future__ import annotations

import json
from typing import Any

import triton_python_backend_utils as pb_utils

from slides.model_metrics import ANSWERS_FOR, network_predictions


class TritonPythonModel:
    """Hands on what it gets; holds nothing but counts."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the parameter; without it there would be nothing to count, so the model does not load."""
        self.predictions = network_predictions(pb_utils, args)
        if self.predictions is None:
            raise pb_utils.TritonModelException(f"{args['model_name']}: parameter {ANSWERS_FOR} is missing")
        self.names = [entry["name"] for entry in json.loads(args["model_config"])["output"]]

    def finalize(self) -> None:
        """Tell the rest of the counts."""
        self.predictions.close()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in order."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        answers = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.names}
        self.predictions.add([request], [len(answers[self.names[0]])], answers)
        wanted = set(request.requested_output_names())
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, answers[name]) for name in self.names if name in wanted]
        )
