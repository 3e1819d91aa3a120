"""A real slide file and predictions to draw, for the tests of the client."""

from __future__ import annotations

import socket
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from clients.prediction import Prediction, TilePrediction

SLIDE_SIDE_PX = 2560
UM_PER_PX = 0.5


@pytest.fixture(scope="session")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiled TIFF at 0.5 um/px: one island of pink, grainy tissue on white glass."""
    rng = np.random.default_rng(3)
    image_HWC = np.full((SLIDE_SIDE_PX, SLIDE_SIDE_PX, 3), 243, np.uint8)
    island_HW = np.zeros(image_HWC.shape[:2], np.uint8)
    cv2.ellipse(island_HW, (1200, 1300), (900, 700), 20, 0, 360, 1, -1)
    grain_HWC = rng.normal((190, 90, 140), 22, image_HWC.shape).clip(0, 255).astype(np.uint8)
    image_HWC[island_HW > 0] = grain_HWC[island_HW > 0]
    path = tmp_path_factory.mktemp("slides") / "abc123_0.tif"
    per_cm = 10_000 / UM_PER_PX
    tifffile.imwrite(
        path,
        image_HWC,
        photometric="rgb",
        tile=(256, 256),
        compression="jpeg",
        resolution=(per_cm, per_cm),
        resolutionunit="CENTIMETER",
    )
    return path


@pytest.fixture
def prediction() -> Prediction:
    """A prediction of two classes with four tiles on a slide of 4000 x 2000 px."""
    tiles = tuple(
        TilePrediction(x_px, 500, 500, 0.9, {"CE": p, "LAA": 1 - p})
        for x_px, p in ((500, 0.0), (1000, 0.25), (1500, 0.75), (3000, 1.0))
    )
    return Prediction(
        image_id="abc123_0",
        patient_id="abc123",
        label="CE",
        confidence=0.5,
        probabilities={"CE": 0.5, "LAA": 0.5},
        tiles=tiles,
        model="tile_classifier",
        model_version="3",
        slide_size_px=(4000, 2000),
        um_per_px=0.5,
    )


@pytest.fixture
def unused_port() -> int:
    """A port of this machine where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
