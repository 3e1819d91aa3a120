"""Tiles, and the files that perf_analyzer reads (which test_bench.py gives to a real one)."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perf.__main__ import main
from perf.errors import PerfInputError
from perf.inputs import write_inputs
from perf.tiles import benchmark_tiles, photograph_tiles, tiles_in
from slides.decode import decode_tile, encode_tile


def test_made_up_tiles_are_different_whole_and_the_same_every_time(tiles: list[bytes]) -> None:
    assert len(set(tiles)) == len(tiles) == 8
    assert all(decode_tile(tile, 64).shape == (64, 64, 3) for tile in tiles)
    assert benchmark_tiles(8, 64) == tiles


@pytest.mark.parametrize(("count", "size_px"), [(0, 64), (65, 64), (4, 8)])
def test_impossible_numbers_are_refused(count: int, size_px: int) -> None:
    with pytest.raises(PerfInputError):
        benchmark_tiles(count, size_px)


def test_the_json_holds_each_tile_as_on_the_wire(tiles: list[bytes], tmp_path: Path) -> None:
    data = json.loads(write_inputs(tmp_path / "in", tiles).read_text())["data"]
    for entry, tile in zip(data, tiles, strict=True):
        assert entry["tile"]["shape"] == [1]
        assert base64.b64decode(entry["tile"]["content"]["b64"]) == struct.pack("<I", len(tile)) + tile
    assert tiles_in(tmp_path / "in") == tiles


def test_photographs_are_cut_and_continued_without_resampling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    pixels_HWC = np.random.default_rng(1).integers(0, 256, (2, 100, 150, 3), dtype=np.uint8)
    for number, pixels in enumerate(pixels_HWC):
        Image.fromarray(pixels).save(photographs / f"{number}.png")
    words = ["inputs", "--photographs", str(photographs), "--out", str(tmp_path / "out"), "--size-px", "128"]
    assert main([*words, "--count", "2"]) == 0
    found = tiles_in(tmp_path / "out")
    whole = [np.concatenate([each[:, :128], each[:71:-1, :128]]) for each in pixels_HWC]
    assert found == [encode_tile(tile, 90) for tile in whole]
    assert main([*words, "--count", "3"]) == 2
    assert "holds 2 photographs, and 3 are needed" in capsys.readouterr().err
    with pytest.raises(PerfInputError, match="less than half a tile"):
        photograph_tiles(photographs, 1, 512)
    (photographs / "0.png").write_bytes(b"no image")
    with pytest.raises(PerfInputError, match=r"0\.png cannot be read"):
        photograph_tiles(photographs, 1, 128)


def test_a_directory_without_tiles_or_with_a_broken_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PerfInputError, match="holds no file"):
        tiles_in(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert main(["inputs", "--tiles", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "broken.jpg" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
