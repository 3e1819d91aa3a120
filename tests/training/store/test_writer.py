from __future__ import annotations

import fcntl
import importlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from slides.errors import LabelsError
from slides.reader import open_slide
from slides.tissue import iter_tiles
from tests.one_level_tiff import glass_and_tissue, write_one_level_bigtiff
from tests.training.store.conftest import CLASS_NAMES, write_labels, write_slide
from training.errors import DataError, OutputExistsError, StoreError
from training.store import workers
from training.store.reader import TileStore
from training.store.slide_file import SlideJob
from training.store.spec import StoreSpec
from training.store.writer import StoreReport, write_store

DEADLY_CUT = """
import os, signal

def cut(job):  # dies as a decoder does that crashes
    if job.image_id.startswith("deadly"):
        os.kill(os.getpid(), signal.SIGKILL)
    return 7
"""


def tile(data_dir: Path, out: Path, spec: StoreSpec, **options: object) -> StoreReport:
    arguments = {"class_names": CLASS_NAMES, "workers_count": 1, "show_progress": False, **options}
    return write_store(data_dir, out, spec, **arguments)  # type: ignore[arg-type]


def command(data_dir: Path, out: Path, *more: str) -> list[str]:
    line = f"-m training tile --class-names CE,LAA --tile-size 64 --um-per-px 0.5 --workers {more[0] if more else 2}"
    return [sys.executable, *line.split(), "--data", str(data_dir), "--out", str(out), *more[1:]]


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_tiles_are_those_that_a_client_sends(store: TileStore, data_dir: Path, spec: StoreSpec) -> None:
    for record in store.slides:
        with open_slide(record.path) as slide:
            sent = list(iter_tiles(slide, spec.as_model_spec()))
        rows = store.rows_of(record.image_id)
        assert [store.tile(row) for row in rows] == [data for _, data in sent]
        part = store.index.slice(rows.start, len(rows)).to_pylist()
        for row, (ref, _) in zip(part, sent, strict=True):
            assert (row["x_px"], row["y_px"], row["side_px"]) == (ref.x_px, ref.y_px, ref.side_px)
            assert (row["tissue_share"], row["darkness"]) == (ref.tissue_share, ref.darkness)
            assert (row["image_id"], row["patient_id"]) == (record.image_id, record.patient_id)
            assert (row["center_id"], row["label"]) == (record.center_id, record.label)
            assert row["sharpness"] > 0
            assert (row["level"], row["um_per_px"], row["stain_normalised"]) == (0, 0.5, False)


def test_killed_at_any_time_and_run_again_it_is_the_same_store(
    data_dir: Path, store: TileStore, tmp_path: Path
) -> None:
    out, chance = tmp_path / "store", random.Random(11)
    line = command(data_dir, out)
    kills = 0
    for _ in range(3):
        running = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # From the first file on, so that it is killed at its work and not while Python starts.
        while running.poll() is None and not list(out.glob("slides/.*")) and not list(out.glob("slides/*")):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.25))
        workers_of_it = psutil.Process(running.pid).children(recursive=True) if running.poll() is None else []
        running.send_signal(signal.SIGKILL)
        kills += running.wait() == -signal.SIGKILL
        _, alive = psutil.wait_procs(workers_of_it, timeout=10)
        assert not alive, "workers end with the process that started them"
        running.wait()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("slides/*.arrow")}
    assert subprocess.run(line, capture_output=True, check=True).returncode == 0
    assert kills
    assert all(path.stat().st_mtime_ns == at for path, at in finished.items()), "no slide is cut twice"
    found, expected = files_of(out), files_of(store.path)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_stops_at_once_and_leaves_nothing_half_written(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    data, out = tmp_path / "data", tmp_path / "store"
    (data / "train").mkdir(parents=True)
    for name in ("a_0", "b_0"):
        write_one_level_bigtiff(data / "train" / f"{name}.tif", 100_000, glass_and_tissue(256))
    write_labels(data, ["a_0", "b_0"])
    running = subprocess.Popen(command(data, out), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while running.poll() is None and len(psutil.Process(running.pid).children()) < 2:
        time.sleep(0.05)
    time.sleep(1)
    running.send_signal(number)
    assert running.wait(20) == code
    assert running.stdout
    assert running.stdout.read() == b""
    assert [str(path) for path in out.rglob("*partial*")] == []
    assert not (out / "index.parquet").exists()


def test_bad_slides_are_listed_and_the_others_go_on(data_dir: Path, tmp_path: Path, spec: StoreSpec) -> None:
    data, out = tmp_path / "data", tmp_path / "store"
    shutil.copytree(data_dir, data)
    train = data / "train"
    (train / "empty_0.tif").touch()
    whole = (train / "p0_0.tif").read_bytes()
    (train / "cut_0.tif").write_bytes(whole[: len(whole) // 2])
    shutil.copyfile(Path(__file__).parents[2] / "slides" / "golden_tile.jpg", train / "photo_0.jpg")
    good = [f"p{number}_0" for number in range(4)]
    write_labels(data, [*good[:2], "empty_0", "cut_0", "photo_0", "missing_0", *good[2:]])
    report = tile(data, out, spec)
    opened = TileStore.open(out)
    assert [record.image_id for record in opened.slides] == good
    reasons = dict(opened.failed)
    assert list(reasons) == ["empty_0", "cut_0", "photo_0", "missing_0"]
    assert "zero bytes" in reasons["empty_0"]
    assert "truncated" in reasons["cut_0"]
    assert "not a slide" in reasons["photo_0"]
    assert "no such slide" in reasons["missing_0"]
    assert "zero bytes" in (out / "report.html").read_text()
    assert (report.cut_slides, len(report.failed)) == (4, 4)
    write_slide(train / "empty_0.tif", 9)
    again = tile(data, out, spec)
    assert (again.cut_slides, len(again.failed)) == (1, 3), "a failed slide is tried again"


def test_strict_exits_with_1(data_dir: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "store"
    shutil.copytree(data_dir, data)
    (data / "train" / "p1_0.tif").write_bytes(b"")
    done = subprocess.run(command(data, out, "2", "--strict"), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert '"failed":1' in done.stdout.splitlines()[-1]
    assert "failed: p1_0: " in done.stderr
    assert len(TileStore.open(out).slides) == 3


def test_a_second_run_with_other_values_is_refused(store: TileStore, data_dir: Path) -> None:
    before = files_of(store.path)
    other = StoreSpec(tile_size_px=64, um_per_px=1.0, tiles_per_slide=8, min_tissue_share=0.5)
    with pytest.raises(StoreError, match=r"(?s)um_per_px is 0\.5 there, 1\.0 is asked for") as caught:
        tile(data_dir, store.path, other)
    assert "tiles_per_slide is 100000 there, 8 is asked for" in str(caught.value)
    assert files_of(store.path) == before


def test_overwrite_cuts_anew(data_dir: Path, tmp_path: Path, spec: StoreSpec) -> None:
    tile(data_dir, tmp_path / "store", spec)
    other = StoreSpec(tile_size_px=64, um_per_px=1.0, tiles_per_slide=3, min_tissue_share=0.5)
    report = tile(data_dir, tmp_path / "store", other, overwrite=True)
    assert (report.cut_slides, report.cut_tiles) == (4, 12)
    assert len(TileStore.open(tmp_path / "store")) == 12


def test_a_folder_with_something_else_is_left_alone(data_dir: Path, tmp_path: Path, spec: StoreSpec) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(OutputExistsError, match=r"something other than a tile store \(thesis\.tex\)"):
        tile(data_dir, tmp_path, spec, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_runs_at_once(store: TileStore, data_dir: Path, spec: StoreSpec) -> None:
    with (store.path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="another run is writing"):
            tile(data_dir, store.path, spec)
    assert tile(data_dir, store.path, spec).cut_slides == 0


def test_what_changed_is_cut_again_and_nothing_else(data_dir: Path, tmp_path: Path, spec: StoreSpec) -> None:
    data, out = tmp_path / "data", tmp_path / "store"
    shutil.copytree(data_dir, data)
    tile(data, out, spec)
    write_slide(data / "train" / "p1_0.tif", 21)
    write_slide(data / "train" / "new_0.tif", 5)
    write_labels(data, ["p0_0", "p1_0", "p2_0", "p3_0", "new_0"])
    assert tile(data, out, spec).cut_slides == 2
    assert len(TileStore.open(out).slides) == 5
    write_labels(data, ["p1_0", "p0_0", "p2_0", "p3_0", "new_0"])  # labels change, pixels do not
    assert tile(data, out, spec).cut_slides == 0
    assert TileStore.open(out).slides[0].image_id == "p1_0"
    (data / "train" / "new_0.tif").unlink()
    write_labels(data, ["p1_0", "p0_0", "p2_0", "p3_0"])
    with pytest.raises(StoreError, match=r"train\.csv does not list \(new_0\)"):
        tile(data, out, spec)


def test_no_usable_slide_and_unusable_labels(tmp_path: Path, spec: StoreSpec) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a_0.tif").touch()
    write_labels(tmp_path, ["a_0", "b_0"])
    with pytest.raises(DataError, match=r"(?s)none of 2 slides.*zero bytes"):
        tile(tmp_path, tmp_path / "store", spec)
    with pytest.raises(StoreError, match="not finished"):
        TileStore.open(tmp_path / "store")
    (tmp_path / "train.csv").unlink()
    with pytest.raises(LabelsError, match="file is missing"):
        tile(tmp_path, tmp_path / "other", spec)
    assert not (tmp_path / "other").exists()


def test_a_slide_that_kills_its_worker_takes_no_other_with_it(
    tmp_path: Path, spec: StoreSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadly_cut.py").write_text(DEADLY_CUT)
    monkeypatch.syspath_prepend(tmp_path)  # worker processes import it by name
    cut = importlib.import_module("deadly_cut").cut
    jobs = [
        SlideJob(name, tmp_path / name, tmp_path, spec) for name in ("a", "deadly 1", "b", "deadly 2", "c")
    ]
    outcomes = {outcome.job.image_id: outcome for outcome in workers.cut_slides(jobs, 2, cut)}
    assert {name: outcome.tiles for name, outcome in outcomes.items()} == {
        "a": 7, "b": 7, "c": 7, "deadly 1": 0, "deadly 2": 0
    }  # fmt: skip
    assert "was killed" in str(outcomes["deadly 1"].reason)


def test_a_real_aperio_slide(aperio: Path, tmp_path: Path, spec: StoreSpec) -> None:
    data = tmp_path / "data"
    (data / "train").mkdir(parents=True)
    shutil.copyfile(aperio, data / "train" / "cmu_0.svs")
    write_slide(data / "train" / "p1_0.tif", 1)
    write_labels(data, ["cmu_0", "p1_0"])
    own = StoreSpec(tile_size_px=128, um_per_px=0.5, tiles_per_slide=1000, min_tissue_share=0.5)
    tile(data, tmp_path / "store", own)
    opened = TileStore.open(tmp_path / "store")
    rows = opened.rows_of("cmu_0")
    assert 115 <= len(rows) <= 145
    part = opened.index.slice(rows.start, len(rows)).to_pydict()
    assert set(part["side_px"]) == {128}
    assert set(part["x_px"]) <= {128 * column for column in range(17)}
    assert min(part["x_px"]) >= 256, "the left edge of the slide is glass"
    assert min(part["sharpness"]) > 100, "it is in focus"


@pytest.mark.timeout(170)
def test_gigapixels_in_one_level_stay_below_a_gigabyte_and_a_half(tmp_path: Path) -> None:
    """Memory of all processes together, each at its own worst: two slides of 40,000 x 40,000 at a time."""
    data, out = tmp_path / "data", tmp_path / "store"
    (data / "train").mkdir(parents=True)
    blocks = glass_and_tissue()
    for name in ("a_0", "b_0"):
        write_one_level_bigtiff(data / "train" / f"{name}.tif", 40_000, blocks)
    write_labels(data, ["a_0", "b_0"])
    line = [*command(data, out), "--tiles-per-slide", "200"]
    worst_kb: dict[int, int] = {}
    running = psutil.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while running.poll() is None:
        for pid in [running.pid, *(child.pid for child in running.children(recursive=True))]:
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            peak = [int(entry.split()[1]) for entry in status.splitlines() if entry.startswith("VmHWM")]
            worst_kb[pid] = max([worst_kb.get(pid, 0), *peak])
        time.sleep(0.05)
    assert running.returncode == 0, running.stderr.read().decode()
    assert len(TileStore.open(out)) == 400
    assert len(worst_kb) >= 3
    assert 150_000 < sum(worst_kb.values()) < 1_500_000
