from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.__main__ import COMMANDS
from training.commands import main
from training.store.reader import TileStore


def run(*arguments: object) -> int:
    return main("python -m training", None, {"tile": COMMANDS["tile"]}, ["tile", *map(str, arguments)])


def test_by_recipe(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--tile-size", 64, "--tiles-per-slide", 5, "--workers", 1)
    assert run("--data", data_dir, "--out", tmp_path / "store", "--recipe", "demo", *more) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out.splitlines()[-1])
    assert (answer["slides"], answer["failed"], answer["tiles"], answer["cut_tiles"]) == (4, 0, 20, 20)
    assert "tiling" in err
    store = TileStore.open(tmp_path / "store")
    assert answer["fingerprint"] == store.fingerprint
    assert (store.spec_of_cut.um_per_px, store.spec_of_cut.jpeg_quality) == (0.5, 90), "as the recipe says"
    assert run("--data", data_dir, "--out", tmp_path / "store", "--recipe", "demo", *more) == 0
    assert json.loads(capsys.readouterr().out)["cut_slides"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --recipe, or --tile-size, --um-per-px, --class-names"),
        (["--recipe", "nonsense"], "is not known"),
        (["--recipe", "bccd"], "ready cut"),
        (["--recipe", "demo", "--jpeg-quality", "0"], "jpeg_quality"),
        (["--recipe", "demo", "--workers", "0"], "--workers"),
        (["--recipe", "demo", "--stain-normalise", "reinhard"], "needs a --stain-reference"),
        (["--recipe", "demo", "--stain-reference", "missing.png"], "cannot be read"),
        (["--recipe", "demo", "--class-names", "A,B"], "label 'CE' is none of A, B"),
    ],
)
def test_wrong_input_is_told_before_anything_is_written(
    arguments: list[str], message: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--data", data_dir, "--out", tmp_path / "store", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""
    assert not (tmp_path / "store").exists()
