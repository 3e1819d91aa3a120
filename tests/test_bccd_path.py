"""The whole path on real photographs: train on BCCD crops, export, serve, and compare every single answer."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from clients.slide_client import SlideClient
from slides.decode import decode_tile
from tests.conftest import serve

ROOT = Path(__file__).parents[1]
LEAST_ACCURACY = 0.95
MOST_TRAINING_S = 180.0


@pytest.fixture(scope="module")
def trained(bccd_tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    out = tmp_path_factory.mktemp("bccd run") / "out"
    started = time.monotonic()
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--num_processes",
                "1",
                "--num_machines",
                "1",
            ),
            *(
                "--mixed_precision",
                "no",
                "--dynamo_backend",
                "no",
                "--cpu",
                str(ROOT / "training" / "train.py"),
            ),
            *("--recipe", "bccd", "--data", str(bccd_tiles), "--out", str(out), "--track", "none"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    return out / "checkpoint", {**result, "took_s": time.monotonic() - started}


def test_held_out_cells_are_told_apart_within_three_minutes(trained: tuple[Path, dict[str, float]]) -> None:
    result = trained[1]
    assert result["tile_accuracy"] >= LEAST_ACCURACY
    assert result["took_s"] <= MOST_TRAINING_S


def test_the_served_label_is_pytorchs_for_every_crop(
    trained: tuple[Path, dict[str, float]], bccd_tiles: Path, tmp_path: Path
) -> None:
    import torch

    from training.checkpoint import load

    loaded = load(trained[0])
    with (bccd_tiles / "train.csv").open(newline="") as stream:
        crops = [
            (bccd_tiles / "train" / f"{row['image_id']}.jpg").read_bytes() for row in csv.DictReader(stream)
        ]
    assert len(crops) > 700
    parts = []
    with torch.inference_mode():
        for start in range(0, len(crops), 64):
            tiles_NHWC = np.stack(
                [decode_tile(c, loaded.spec.input_size_px) for c in crops[start : start + 64]]
            )
            parts.append(torch.softmax(loaded.model(torch.from_numpy(tiles_NHWC)), dim=1).numpy())
    torch_NK = np.concatenate(parts)
    assert set(torch_NK.argmax(1)) == {0, 1}
    server = serve(trained[0], tmp_path / "models", "onnx,torchscript")
    try:
        served = next(server)
        for url in (f"http://{served.http_url}", f"grpc://{served.grpc_url}"):
            for model in ("tile_classifier", "tile_classifier_torchscript"):
                with SlideClient(url, model=model) as client:
                    served_NK = client.classify_tiles(crops)
                assert np.array_equal(served_NK.argmax(1), torch_NK.argmax(1)), (url, model)
                assert np.abs(served_NK - torch_NK).max() <= 1e-4, (url, model)
    finally:
        server.close()
