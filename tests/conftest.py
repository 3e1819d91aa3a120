"""Parts that several packages' tests share: an exported repository on a real tritonserver, and the BCCD tile set."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.benchmarks.blood_cells import BCCD_DIR, make_bccd_tiles

# A shell that starts `make test` in the background has it ignore Ctrl-C, and with it all that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Half a minute and more each: they begin first, lest one of them is all that is left for one worker at the end.
LONG_FILES = (
    "tests/training/test_train.py",
    "tests/test_bccd_path.py",
    "tests/serving/releases/test_release_served.py",
    "tests/training/test_multi_node.py",
    "tests/training/test_cross_validation.py",
    "tests/exporters/test_release_directory.py",
    "tests/exporters/test_precisions.py",
    "tests/exporters/test_planted_faults.py",
    "tests/exporters/test_main.py",
    "tests/exporters/test_conformance.py",
    "tests/serving/test_launcher.py",
    "tests/serving/test_supervisor.py",
    "tests/clients/test_slide_client.py",
    "tests/exporters/test_drift_served.py",
    "tests/deploy/test_monitoring_live.py",
    "tests/deploy/test_monitoring_expressions.py",
    "tests/deploy/test_stack.py",
    "tests/deploy/test_gateway.py",
    "tests/deploy/test_gateway_reload.py",
    "tests/deploy/test_monitoring_rules.py",
    "tests/exporters/test_reference_profile.py",
    "tests/serving/test_metrics.py",
    "tests/serving/test_metrics_backends.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, in the order of LONG_FILES; the others as they are."""
    order = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


def run_module(*arguments: str | Path, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """`python -m ...` of this interpreter, with its output."""
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


@dataclass(frozen=True)
class ServedRepository:
    """A real tritonserver that serves what was exported from a real checkpoint."""

    http_url: str
    grpc_url: str
    metrics_url: str
    checkpoint: Path
    repository: Path


def export(checkpoint: Path, *arguments: str | Path) -> None:
    """`python -m exporters export` without a server, in this process: a new one would import PyTorch for seconds."""
    from exporters.__main__ import main

    assert main(["export", str(checkpoint), *map(str, arguments), "--without-server"]) == 0


def serve(checkpoint: Path, repository: Path, formats: str = "onnx") -> Iterator[ServedRepository]:
    """Export the checkpoint into the repository and serve it until the generator is closed."""
    export(checkpoint, "--repository", repository, "--formats", formats)
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "serving", "up", "--repository", str(repository), *ports],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert launcher.stdout
        line = launcher.stdout.readline()
        assert line, "serving up failed: see its error above"
        said = json.loads(line)
        yield ServedRepository(said["http"], said["grpc"], said["metrics"], checkpoint, repository)
    finally:
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(40)


def draw_weights(model: Any) -> None:
    """Convolutions from torch's generator: an untrained SqueezeNet answers the same to everything otherwise."""
    import torch

    for parameter in model.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)


@pytest.fixture(scope="session")
def untrained_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint of an untrained SqueezeNet for 256 px tiles at 0.5 um/px."""
    import torch

    from slides.decode import decode_tile, encode_tile
    from slides.spec import ModelSpec
    from training import checkpoint, network

    spec = ModelSpec(
        class_names=("CE", "LAA"),
        tile_size_px=256,
        um_per_px=0.5,
        input_size_px=128,
        tiles_per_slide=12,
        min_tissue_share=0.5,
    )
    torch.manual_seed(7)
    model = network.build("squeezenet1_1", spec).eval()
    draw_weights(model)
    rng = np.random.default_rng(5)
    golden = []
    for number in range(16):
        blotches = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        data = encode_tile(np.kron(blotches, np.ones((16, 16, 1), np.uint8)), spec.jpeg_quality)
        with torch.inference_mode():
            tile_1HWC = torch.from_numpy(decode_tile(data, spec.input_size_px))[None]
            answer = torch.softmax(model(tile_1HWC), dim=1)[0]
        golden.append(
            checkpoint.GoldenTile(
                image_id=f"p{number}_0",
                label=spec.class_names[number % 2],
                data=data,
                probabilities=tuple(map(float, answer)),
            )
        )
    return checkpoint.save(
        tmp_path_factory.mktemp("untrained") / "checkpoint",
        model,
        spec,
        architecture="squeezenet1_1",
        metrics={"tile_accuracy": 0.5},
        data={"fingerprint": "0" * 64, "slides": 16, "patients": 16, "held_out_patients": []},
        golden_tiles=golden,
    )


@pytest.fixture(scope="session")
def served_repository(
    untrained_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedRepository]:
    """`untrained_checkpoint`, exported into a repository whose path has a space, on a real tritonserver."""
    yield from serve(untrained_checkpoint, tmp_path_factory.mktemp("model repository") / "models")


@pytest.fixture(scope="session")
def bccd_tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The BCCD crops (WBC against RBC) in the layout that training reads."""
    if not BCCD_DIR.is_dir():
        pytest.skip(f"the BCCD photographs are not at {os.path.relpath(BCCD_DIR)}")
    return make_bccd_tiles(tmp_path_factory.mktemp("bccd"))
