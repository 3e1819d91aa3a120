from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from demo.__main__ import main
from demo.errors import DemoError
from demo.path import _build_folder, _publish

ROOT = Path(__file__).parents[2]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        _build_folder(tmp_path / "out"),
        pytest.raises(DemoError, match="another demo is running"),
        _build_folder(tmp_path / "out"),
    ):
        pass
    with _build_folder(tmp_path / "out"):  # free again
        pass


def test_a_failed_run_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("old")
    with contextlib.suppress(KeyError), _build_folder(tmp_path) as build:
        (build / "summary.json").write_text("half")
        raise KeyError
    assert (tmp_path / "summary.json").read_text() == "old"
    assert not list(tmp_path.glob(".build*"))


def test_remains_of_a_killed_run_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".build").mkdir()
    (tmp_path / ".build" / "junk").touch()
    with _build_folder(tmp_path) as build:
        assert list(build.iterdir()) == []


def test_new_artefacts_replace_the_old_ones_and_spare_the_slides(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").touch()
    for run in ("first", "second"):
        with _build_folder(tmp_path) as build:
            for name in ("training", "release", "heatmaps"):
                (build / name).mkdir()
                (build / name / f"{run}.txt").touch()
            for name in ("report.html", "summary.json"):
                (build / name).write_text(run)
            _publish(build, tmp_path)
    assert [path.name for path in (tmp_path / "heatmaps").iterdir()] == ["second.txt"]
    assert (tmp_path / "summary.json").read_text() == "second"
    assert (tmp_path / "data" / "train.csv").exists()


def test_heatmaps_of_an_earlier_run_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / "heatmaps").mkdir()
    with _build_folder(tmp_path) as build:
        (build / "summary.json").write_text("tiles have no heatmaps")
        _publish(build, tmp_path)
    assert not (tmp_path / "heatmaps").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "no/such/folder"], "no train.csv"),
        (["--formats", "onnx,onnx"], "name each format once"),
        (["--formats", ""], "name each format once"),
        (["--least-patient-auc", "2"], "from 0 to 1"),
        (["--epochs", "3"], "unrecognized arguments"),
    ],
)
def test_bad_usage_exits_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["--out", str(tmp_path / "out"), *arguments])
    except SystemExit as ended:  # argparse's own
        code = ended.code
    assert code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_stage_that_fails_is_one_clear_error(tmp_path: Path) -> None:
    """Labels of one class only: training refuses them, and its words are what the user reads."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.csv").write_text("image_id,center_id,patient_id,image_num,label\na_0,1,a,0,CE\n")
    result = subprocess.run(
        [sys.executable, "-m", "demo", "--out", str(tmp_path / "out"), "--data", str(data)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "error: train a network: exit code" in result.stderr
    assert "every row has the label CE" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "logs"]
