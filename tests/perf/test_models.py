"""A repository with random weights, as an export would write it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from perf.errors import PerfInputError
from perf.install import install, perf_analyzer
from perf.models import make_repository
from perf.served_work import served_work
from serving.embedded import triton_home


def test_every_format_has_a_network_and_a_classifier(tmp_path: Path) -> None:
    directory = tmp_path / "models"
    (directory / "old").mkdir(parents=True)
    classifiers = make_repository(
        directory, "mobilenet_v3_small", ["torchscript"], size_px=64, tile_size_px=64, instances=3
    )
    assert classifiers == {"tile_classifier": "torchscript"}
    assert sorted(model.name for model in directory.iterdir()) == [
        "tile_classifier",
        "tile_network_torchscript",
        "tile_preprocess",
    ]
    for model in ("tile_preprocess", "tile_network_torchscript"):  # as many as they keep busy of three
        found = re.search(r"count: (\d+)", (directory / model / "config.pbtxt").read_text())
        assert found
        assert 1 <= int(found[1]) <= 3
    assert all(list((model / "1").iterdir()) for model in directory.iterdir())
    with pytest.raises(PerfInputError, match="'pytorch'"):
        served_work(directory)
    assert [entry.name for entry in tmp_path.iterdir()] == ["models"]


def test_what_cannot_be_made_leaves_nothing_behind(tmp_path: Path) -> None:
    for architecture, formats, instances in (
        ("resnet18", ["smoke"], 2),
        ("resnet18", ["onnx"], 0),
        ("nothing", ["onnx"], 2),
    ):
        with pytest.raises(PerfInputError):
            make_repository(tmp_path / "models", architecture, formats, instances=instances, tile_size_px=64)
    assert not list(tmp_path.iterdir())


def test_the_installed_perf_analyzer_runs_wherever_it_is_called_from(analyzer: Path, tmp_path: Path) -> None:
    link = tmp_path / "linked"
    link.symlink_to(analyzer)
    done = subprocess.run(
        [link, "--version"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": os.defpath},
        check=False,
    )
    assert "2.51.0" in done.stdout + done.stderr
    assert install(triton_home()) == (analyzer, False)
    assert perf_analyzer(triton_home()).exists()
