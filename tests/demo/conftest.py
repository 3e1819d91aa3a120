"""A finished run to report on, put together by hand."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.outcome import Outcome
from demo.parity import Parity
from demo.scores import Scored, by_patient, scored
from demo.stages import Finished
from demo.triton_metrics import ModelCounts
from slides.spec import ModelSpec

SPEC = ModelSpec(
    class_names=("CE", "LAA"),
    tile_size_px=256,
    um_per_px=0.5,
    input_size_px=128,
    tiles_per_slide=16,
    min_tissue_share=0.5,
)


def held_out_images() -> list[Scored]:
    return [
        scored(f"p{patient}_{number}", truth, {"CE": p, "LAA": 1 - p})
        for patient, truth, values in (
            (1, "CE", (0.875, 0.75)),
            (2, "CE", (0.4375,)),
            (3, "LAA", (0.125,)),
            (4, "LAA", (0.25, 0.0625)),
        )
        for number, p in enumerate(values)
    ]


@pytest.fixture
def outcome(tmp_path: Path) -> Outcome:
    """A run where everything worked; patient p2 has the wrong label, the ROC AUC is 1."""
    images = held_out_images()
    heatmaps = {}
    rng = np.random.default_rng(1)
    for image in images:
        heatmaps[image.name] = tmp_path / f"{image.name}.png"
        Image.fromarray(rng.integers(0, 256, (300, 1200, 3), dtype=np.uint8)).save(heatmaps[image.name])
    return Outcome(
        synthetic=True,
        recipe="demo",
        source="slides",
        slides=30,
        patients=20,
        centres=3,
        manifest={
            "architecture": "resnet18",
            "spec": SPEC.as_dict(),
            "metrics": {"tile_accuracy": 0.93, "patient_auc": 1.0, "patient_log_loss": 0.31},
            "data": {"fingerprint": "ab" * 32},
            "git_commit": "0123456789abcdef",
            "created_utc": "2026-01-02T03:04:05Z",
            "weights_sha256": "cd" * 32,
            "versions": {"torch": "2.14.1"},
        },
        history=[
            {"epoch": n, "train_loss": 0.7 / n, "learning_rate": 1e-3, "held_out_tile_accuracy": 1 - 0.4 / n}
            for n in range(1, 7)
        ],
        export={"formats": {"onnx": {"max_abs_diff": 6e-8, "bytes": 44_800_000}}},
        images=images,
        held_out_patients=by_patient(images, {image.name: image.name.split("_")[0] for image in images}),
        parity={
            "onnx": Parity("tile_classifier", "http://127.0.0.1:8000", 96, 2.4e-7, 0),
            "torchscript": Parity("tile_classifier_torchscript", "grpc://127.0.0.1:8001", 96, 0.0, 0),
        },
        image_max_abs_diff=5e-8,
        counts=[
            ModelCounts("tile_classifier", "1", 24, 0, 192, 0, 480_000.0, 0.0, 0.0),
            ModelCounts("tile_classifier_torchscript", "1", 12, 0, 96, 0, 120_000.0, 0.0, 0.0),
            ModelCounts("tile_preprocess", "1", 36, 0, 288, 18, 90_000.0, 9_000.0, 72_000.0),
        ],
        heatmaps=heatmaps,
        stages=(
            Finished("slides", "make synthetic slides", "python -m slides demo --out runs/demo/data", 21.4),
            Finished("parity-onnx", "ask for every held-out tile", "", 1.25),
        ),
        wall_s=163.2,
        least_patient_auc=0.9,
    )


@pytest.fixture
def unused_tcp_port_number() -> int:
    """A port of this machine where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
