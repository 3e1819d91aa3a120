"""Predictions are counted by each of our Python-based backends that runs a classifier's network."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from serving.benchmarks.tiny_release import answer
from tests.serving.conftest import Launch, wait_until
from tests.serving.test_metrics import BIASES, CLASSES, INPUT_PX, TILES, Server, make_counted

ASKED = 5


def as_openvino(network: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="the openvino format is an extra")
    model = network / "1" / "model.onnx"
    openvino.save_model(openvino.Core().read_model(str(model)), str(network / "1" / "model.xml"))
    model.unlink()


def as_torchscript(network: Path) -> None:
    import torch

    from serving.benchmarks.tiny_release import SLOPE

    class Tiny(torch.nn.Module):
        def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            first = SLOPE_ * tiles.float().mean(dim=[1, 2, 3]) + BIAS_
            probabilities = torch.softmax(torch.stack([first, torch.zeros_like(first)], dim=1), dim=1)
            confidence, label_index = probabilities.max(dim=1, keepdim=True)
            return probabilities, confidence, label_index

    SLOPE_, BIAS_ = SLOPE, BIASES["a"]
    torch.jit.trace(Tiny(), torch.zeros(2, INPUT_PX, INPUT_PX, 3, dtype=torch.uint8)).save(
        str(network / "1" / "model.pt")
    )
    (network / "1" / "model.onnx").unlink()


@pytest.mark.parametrize(("backend", "convert"), [("openvino", as_openvino), ("pytorch", as_torchscript)])
def test_the_backend_counts(backend: str, convert: object, tmp_path: Path, launch: Launch) -> None:
    models = make_counted(tmp_path / "release", BIASES["a"]) / "models"
    network = models / "tile_network_onnx"
    convert(network)  # type: ignore[operator]
    config = text_format.Parse((network / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    config.backend, config.default_model_filename = backend, ""
    del config.parameters["intra_op_thread_count"]
    for number, output in enumerate(config.output if backend == "pytorch" else ()):
        output.name = f"{output.name}__{number}"
    (network / "config.pbtxt").write_text(text_format.MessageToString(config))
    ensemble = models / "tile_classifier" / "config.pbtxt"
    if backend == "pytorch":
        steps = text_format.Parse(ensemble.read_text(), model_config_pb2.ModelConfig())
        mapped = dict(steps.ensemble_scheduling.step[1].output_map)
        steps.ensemble_scheduling.step[1].output_map.clear()
        for number, output in enumerate(("probabilities", "confidence", "label_index")):
            steps.ensemble_scheduling.step[1].output_map[f"{output}__{number}"] = mapped[output]
        ensemble.write_text(text_format.MessageToString(steps))
    server = Server(backend, launch(models, "--name", backend).ready(), {})
    for _ in range(ASKED):
        server.ask(TILES)
    wanted = dict.fromkeys(CLASSES, 0)
    for tile in TILES:
        wanted[CLASSES[int(answer(tile, INPUT_PX, BIASES["a"], 2).argmax())]] += ASKED
    wait_until(lambda: server.predictions() == wanted, 15)
