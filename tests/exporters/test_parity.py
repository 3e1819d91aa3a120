"""The gate lets a faithful artefact pass and stops each planted fault."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from exporters.comparison_tiles import decode_tiles, golden_tiles, read_tiles
from exporters.errors import GoldenTilesError, ParityError
from exporters.formats import formats_named
from exporters.formats.interface import Answer, Runner
from exporters.parity import check_parity, reference_answer
from exporters.served_graph import ServedGraph
from slides.decode import encode_tile
from training import network
from training.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def tiles_NHWC(loaded: Checkpoint) -> np.ndarray:
    return decode_tiles(golden_tiles(loaded), loaded.spec.input_size_px)


@pytest.fixture(scope="module")
def expected(loaded: Checkpoint, tiles_NHWC: np.ndarray) -> Answer:
    return reference_answer(loaded.model, tiles_NHWC)


@pytest.fixture
def traced(tmp_path: Path, tiles_NHWC: np.ndarray) -> Callable[[nn.Module], Runner]:
    """Writes a module as TorchScript, faults included, and opens it as the format does."""

    def trace(module: nn.Module) -> Runner:
        path = tmp_path / "model.pt"
        written = io.BytesIO()
        with torch.no_grad():
            torch.jit.save(torch.jit.trace(module.eval(), torch.from_numpy(tiles_NHWC[:2])), written)
        path.write_bytes(written.getvalue())
        return formats_named(["torchscript"])[0].open(path)

    return trace


def graph(
    loaded: Checkpoint, *, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None
) -> ServedGraph:
    return ServedGraph(
        loaded.model.backbone, mean or loaded.spec.mean, std or loaded.spec.std, channels_last=True
    )


class Altered(nn.Module):
    """A served graph whose answer is altered."""

    def __init__(self, inner: nn.Module, alter: Callable[..., tuple[torch.Tensor, ...]]) -> None:
        super().__init__()
        self.inner, self.alter = inner, alter

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.alter(*self.inner(tiles))


def test_a_faithful_graph_passes(
    loaded: Checkpoint, traced: Callable[[nn.Module], Runner], tiles_NHWC: np.ndarray, expected: Answer
) -> None:
    measured = check_parity("torchscript", traced(graph(loaded)), tiles_NHWC, expected, max_batch=8)
    assert measured.max_abs_diff <= 1e-5
    assert measured.batches == (1, 2, 8)
    assert measured.tiles == 6


def test_missing_normalisation_is_stopped_in_a_network_that_is_sure_of_itself(
    loaded: Checkpoint, traced: Callable[[nn.Module], Runner], tiles_NHWC: np.ndarray
) -> None:
    class Sure(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone
            self.register_buffer("bias", torch.tensor([12.0, 0.0]))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 0.03 * self.backbone(images) + self.bias

    sure = network.TileNetwork(Sure(loaded.model.backbone), loaded.spec).eval()
    expected = reference_answer(sure, tiles_NHWC)
    assert expected.probabilities[:, 0].min() > 0.9999
    raw = ServedGraph(sure.backbone, (0.0, 0.0, 0.0), (1 / 255,) * 3, channels_last=True)
    with pytest.raises(ParityError, match="logarithms"):
        check_parity("torchscript", traced(raw), tiles_NHWC, expected, max_batch=8)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda p, c, i: (p.flip(1), c, i), "probabilities differ"),
        (lambda p, c, i: (p, c, 1 - i), "6 labels|2 labels|1 labels"),
        (lambda p, c, i: (p * torch.nan, c, i), "not finite"),
        (lambda p, c, i: (p, c * torch.inf, i), "not finite"),
        (lambda p, c, i: (p + 2e-4, c, i), "differ"),
        (lambda p, c, i: (p, c + 2e-4, i), "differ"),
        (lambda p, c, i: (p, c[:, 0], i), r"confidence is float32 \[1\], expected float32 \[1, 1\]"),
        (lambda p, c, i: (p, c, i.to(torch.int32)), "label_index is int32"),
        (lambda p, c, i: (p, c), "fails where PyTorch answers"),
    ],
    ids=[
        "swapped_classes",
        "labels",
        "nan",
        "inf",
        "probability",
        "confidence",
        "shape",
        "dtype",
        "missing_output",
    ],
)
def test_an_altered_answer_is_stopped(
    alter: Callable[..., tuple[torch.Tensor, ...]],
    message: str,
    loaded: Checkpoint,
    traced: Callable[[nn.Module], Runner],
    tiles_NHWC: np.ndarray,
    expected: Answer,
) -> None:
    with pytest.raises(ParityError, match=message):
        check_parity("torchscript", traced(Altered(graph(loaded), alter)), tiles_NHWC, expected, max_batch=8)


def test_a_network_that_answers_the_same_to_all_tiles_proves_nothing(
    loaded: Checkpoint, tiles_NHWC: np.ndarray
) -> None:
    class Constant(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 1e-4 * images.mean((2, 3))

    with pytest.raises(ParityError, match="same answer to all 6 golden tiles"):
        reference_answer(network.TileNetwork(Constant(), loaded.spec), tiles_NHWC)
    with pytest.raises(ParityError, match="same answer to all 3 golden tiles"):
        reference_answer(loaded.model, tiles_NHWC[[0, 0, 0]])


def test_tiles_that_are_missing_or_no_tiles_are_named(tmp_path: Path) -> None:
    with pytest.raises(GoldenTilesError, match="--tiles"):
        decode_tiles([], 64)
    with pytest.raises(GoldenTilesError, match="cannot be read"):
        read_tiles(tmp_path / "none")
    with pytest.raises(GoldenTilesError, match="no JPEG or PNG"):
        read_tiles(tmp_path)
    (tmp_path / "a.jpg").write_bytes(encode_tile(np.zeros((64, 64, 3), np.uint8), 90))
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("not read")
    tiles = read_tiles(tmp_path)
    assert [Path(tile.name).name for tile in tiles] == ["a.jpg", "b.png"]
    with pytest.raises(GoldenTilesError, match=r"b\.png is no tile"):
        decode_tiles(tiles, 64)
