"""What is timed, where, and what becomes of the figures."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporters import acceptance
from exporters.acceptance import judge, machine_name, measure_speed
from exporters.errors import RefusedError
from exporters.formats import formats_named
from exporters.formats.interface import Artifact
from exporters.parity import Parity

TILES_NHWC = np.zeros((2, 8, 8, 3), np.uint8)
PARITY = Parity("fp16", 64, (1, 2, 8), 0.01, 0.1, 0.001, 50.0, 0, 32, (0.9, 0.9), (0.3, 0.3))
SMALL, LARGE = Artifact({"model.onnx": b"x"}), Artifact({"model.onnx": b"xx"})


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "_ROUND_S", 0.005)


def taking(seconds: float, seen: list[int] | None = None) -> Callable[[np.ndarray], Any]:
    def run(tiles: np.ndarray) -> Any:
        if seen is not None:
            seen.append(len(tiles))
        time.sleep(seconds)

    return run


def test_fp32_is_timed_alone_and_others_in_turns_with_it() -> None:
    seen: list[int] = []
    alone = measure_speed([taking(0.002, seen)], TILES_NHWC, batch=5, machine="this one")
    assert set(seen) == {5}  # tiles are taken again where there are too few
    assert 0 < alone.images_per_s < 5 / 0.002
    assert (alone.fp32_images_per_s, alone.ratio, alone.machine) == (None, None, "this one")
    both = measure_speed([taking(0.001), taking(0.01)], TILES_NHWC, batch=2, machine="this one")
    assert both.ratio is not None
    assert both.ratio > 1.5
    (onnx,) = formats_named(["onnx"])
    found = judge(onnx, LARGE, PARITY, run=taking(0.001), baseline=None, tiles_NHWC=TILES_NHWC, max_batch=2)
    assert found.status == "accepted"
    assert found.speed is not None
    assert found.speed.machine == machine_name()


def test_what_is_for_a_gpu_is_timed_there_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    (fp16,) = formats_named(["onnx-fp16"])
    seen: list[int] = []

    def judged() -> Any:
        return judge(
            fp16, SMALL, PARITY, run=taking(0.001, seen), baseline=(LARGE, taking(0.02)),
            tiles_NHWC=TILES_NHWC, max_batch=2,
        )  # fmt: skip

    monkeypatch.setattr(type(fp16), "unproven_here", lambda self: "no GPU")
    here = judged()
    assert (here.status, here.reasons, here.speed, seen) == ("unproven", ("no GPU",), None, [])

    monkeypatch.setattr(type(fp16), "unproven_here", lambda self: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    there = judged()
    assert there.status == "accepted"
    assert there.speed.machine == "a GPU"
    assert there.speed.ratio > 1.0


def test_a_refusal_keeps_its_figures() -> None:
    (int8,) = formats_named(["openvino-int8"])
    measured = dataclasses.replace(PARITY, precision="int8")
    with pytest.raises(RefusedError, match="is not faster") as caught:
        judge(
            int8, SMALL, measured, run=taking(0.02), baseline=(LARGE, taking(0.001)),
            tiles_NHWC=TILES_NHWC, max_batch=2,
        )  # fmt: skip
    assert caught.value.measured == measured
    assert caught.value.speed is not None
    assert caught.value.speed.ratio is not None
    assert caught.value.speed.ratio < 1.0


def test_the_machine_is_named_even_where_it_says_nothing(tmp_path: Path) -> None:
    assert "cores" in machine_name(tmp_path / "none")
