"""The model that MLflow loads: executed from this file (MLflow's "models from code"), so that nothing is unpickled.

MLflow copies this file to the top of the model; the Checkpoint lies in artifacts/checkpoint beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

IMAGES_AT_ONCE = 32


class CheckpointModel(PythonModel):
    """Images in, probabilities out; see `training.tracking.model.signature` for shapes and dtypes."""

    def load_context(self, context: Any) -> None:
        from training import checkpoint

        directory = context.artifacts["checkpoint"]
        self.is_of_slides = checkpoint.kind_of(directory) == checkpoint.SLIDE
        if self.is_of_slides:
            from training.mil import checkpoint as slide_checkpoint

            self.checkpoint: Any = slide_checkpoint.load(directory)
        else:
            self.checkpoint = checkpoint.load(directory)

    def predict(
        self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """uint8 [N, S, S, 3] to FP32 [N, K]; for a slide model, the N tiles of one slide to FP32 [1, K]."""
        import torch

        images_NHWC = torch.from_numpy(np.ascontiguousarray(model_input, dtype=np.uint8))
        network = self.checkpoint.encoder if self.is_of_slides else self.checkpoint.model
        with torch.inference_mode():
            answers_ND = torch.cat([network(chunk) for chunk in images_NHWC.split(IMAGES_AT_ONCE)]).float()
            if not self.is_of_slides:
                return torch.softmax(answers_ND, dim=1).numpy()
        return self.checkpoint.pool(answers_ND.numpy()).probabilities_K[None]


set_model(CheckpointModel())
