"""Normalisation on rows of bytes: the same answers, and no transpose left before the first convolution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from exporters.formats.interface import Network
from exporters.formats.openvino_rows import normalise_rows

openvino = pytest.importorskip("openvino", reason="an extra of the exporters")

SIDE_PX = 32
FP32 = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}


def read(network: Network, directory: Path) -> Any:
    (directory / "model.onnx").write_bytes(network.onnx)
    return openvino.Core().read_model(str(directory / "model.onnx"))


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 64, 7, stride=2, padding=3), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2),
    ).eval()  # fmt: skip
    return Network(backbone, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), SIDE_PX)


def answers(model: Any, tiles_NHWC: np.ndarray) -> np.ndarray:
    compiled = openvino.Core().compile_model(model, "CPU", FP32)
    return np.array(compiled({"tiles": tiles_NHWC})["probabilities"])


def executed_before_the_first_convolution(model: Any, batch: int) -> list[str]:
    """What took time there: OpenVINO's own profile, in which an operation that became a view is not run."""
    fixed = model.clone()
    fixed.reshape([batch, SIDE_PX, SIDE_PX, 3])
    request = openvino.Core().compile_model(fixed, "CPU", {**FP32, "PERF_COUNT": True}).create_infer_request()
    request.infer({"tiles": np.zeros((batch, SIDE_PX, SIDE_PX, 3), np.uint8)})
    executed = openvino.ProfilingInfo.Status.EXECUTED
    kinds = [layer.node_type for layer in request.profiling_info if layer.status == executed]
    return kinds[: kinds.index("Convolution")]


def test_the_answers_stay_the_same_and_no_transpose_is_left(network: Network, tmp_path: Path) -> None:
    before, after = read(network, tmp_path), read(network, tmp_path)
    assert normalise_rows(after) == 3  # to float, times, plus
    tiles_NHWC = np.random.default_rng(0).integers(0, 256, (3, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    assert np.array_equal(answers(before, tiles_NHWC), answers(after, tiles_NHWC))
    assert np.ptp(answers(before, tiles_NHWC)) > 0.001
    assert {"Transpose", "Reorder"} <= set(executed_before_the_first_convolution(before, 2))
    assert not {"Transpose", "Reorder"} & set(executed_before_the_first_convolution(after, 2))


@pytest.mark.parametrize("batch", [1, 5])
def test_a_batch_may_be_set_afterwards_as_the_native_backend_does(
    batch: int, network: Network, tmp_path: Path
) -> None:
    model = read(network, tmp_path)
    normalise_rows(model)
    model.get_parameters()[0].set_layout(openvino.Layout("N..."))
    openvino.set_batch(model, batch)
    assert answers(model, np.zeros((batch, SIDE_PX, SIDE_PX, 3), np.uint8)).shape == (batch, 2)


def test_it_is_done_once(network: Network, tmp_path: Path) -> None:
    model = read(network, tmp_path)
    assert normalise_rows(model) == 3
    assert normalise_rows(model) == 0


def beginning(op: Any, made: Callable[[Any], Any]) -> Any:
    tiles = op.parameter([-1, 4, 4, 3], np.uint8, "tiles")
    return openvino.Model([op.result(made(tiles))], [tiles])


def test_what_begins_otherwise_is_left_as_it_is() -> None:
    from openvino import opset13 as op

    to_planes, otherwise = np.array([0, 3, 1, 2]), np.array([0, 3, 2, 1])
    a_pixel_each = np.ones((1, 3, 4, 4), np.uint8)
    a_colour_each = np.arange(1, 4, dtype=np.uint8).reshape(1, 3, 1, 1)
    for made in (
        lambda tiles: op.multiply(op.transpose(tiles, otherwise), a_colour_each),
        lambda tiles: op.multiply(op.transpose(tiles, to_planes), a_pixel_each),
        lambda tiles: op.concat([op.transpose(tiles, to_planes)] * 2, axis=1),
        lambda tiles: op.multiply(tiles, np.uint8(2)),
    ):
        model = beginning(op, made)
        operations = [node.get_name() for node in model.get_ordered_ops()]
        assert normalise_rows(model) == 0
        assert [node.get_name() for node in model.get_ordered_ops()] == operations
    model = beginning(op, lambda tiles: op.multiply(op.transpose(tiles, to_planes), a_colour_each))
    tiles_NHWC = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    assert normalise_rows(model) == 1
    found = np.array(openvino.Core().compile_model(model, "CPU")([tiles_NHWC])[0])
    assert np.array_equal(found, tiles_NHWC.transpose(0, 3, 1, 2) * a_colour_each)
