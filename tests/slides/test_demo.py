from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import openslide
import pytest

from slides import demo, demo_render
from slides.demo import make_demo_slides
from slides.errors import DemoError
from slides.labels import patient_of, read_labels
from slides.reader import open_slide

SMALL = {"slides": 4, "patients": 4, "centers": 2, "seed": 3, "size_px": (2048, 1536), "workers": 1}
COMMAND = [sys.executable, "-m", "slides", "demo", "--slides", "8", "--patients", "4", "--centers", "1"]


def test_the_set_is_readable_labels_and_slides(demo_dir: Path) -> None:
    records = read_labels(demo_dir, class_names=demo.CLASS_NAMES)
    assert len(records) == 4
    assert all(patient_of(record.image_id) == record.patient_id for record in records)
    for record in records:
        with openslide.OpenSlide(record.path) as slide:
            assert slide.dimensions == (2048, 1536)
            assert slide.level_dimensions[1] == (512, 384)
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(demo_dir: Path, tmp_path: Path) -> None:
    again = make_demo_slides(tmp_path / "again", **SMALL)
    other = make_demo_slides(tmp_path / "other", **(SMALL | {"seed": 4}))
    for path in sorted(demo_dir.rglob("*.*")):
        assert (again / path.relative_to(demo_dir)).read_bytes() == path.read_bytes()
    assert not {path.name for path in (other / "train").iterdir()} & {
        path.name for path in (demo_dir / "train").iterdir()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"], "nothing else is left"


def test_a_complete_set_is_kept_and_a_damaged_one_is_made_anew(tmp_path: Path) -> None:
    out_dir = make_demo_slides(tmp_path / "set", **SMALL)
    slide = sorted((out_dir / "train").iterdir())[0]
    before = slide.stat()
    make_demo_slides(out_dir, **SMALL)
    assert slide.stat() == before
    data = slide.read_bytes()
    slide.write_bytes(data[:1000])
    with pytest.raises(DemoError, match=r"incomplete ones.*--overwrite"):
        make_demo_slides(out_dir, **SMALL)
    make_demo_slides(out_dir, **SMALL, overwrite=True)
    assert slide.read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    for overwrite in (False, True):
        with pytest.raises(DemoError, match="choose another folder"):
            make_demo_slides(tmp_path, **SMALL, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "ten years of work"
    (tmp_path / "file").touch()
    with pytest.raises(DemoError, match="cannot be"):
        make_demo_slides(tmp_path / "file" / "set", **SMALL)


@pytest.mark.parametrize(
    "wrong", [{"slides": 3}, {"patients": 3}, {"centers": 0}, {"seed": -1}, {"size_px": (100, 2048)}], ids=str
)
def test_impossible_numbers(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(DemoError, match="demo slides: "):
        make_demo_slides(tmp_path / "set", **(SMALL | wrong))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(("slides", "patients", "centers"), [(30, 20, 3), (24, 16, 3), (40, 20, 4)])
def test_centre_and_patient_say_nothing_about_the_label(slides: int, patients: int, centers: int) -> None:
    plans = demo._plan(slides, patients, centers, 7, (5120, 4096))
    labels_of = {plan.patient_id: plan.label for plan in plans}
    assert len(plans) == slides
    assert len(labels_of) == patients
    assert len({plan.image_id for plan in plans}) == slides
    assert all(labels_of[plan.patient_id] == plan.label for plan in plans)
    patients_of = Counter((plan.center_id, plan.label) for plan in plans if plan.image_num == 0)
    assert len(patients_of) == 2 * centers
    assert all(patients_of[str(c), "CE"] == patients_of[str(c), "LAA"] for c in range(1, centers + 1))


def test_a_mean_colour_does_not_tell_the_label_but_a_texture_does() -> None:
    """Ranked by the mean colour of their tissue the classes mix; ranked by how striated it is they do not."""

    def area_under_curve(scores: list[float], labels: list[int]) -> float:
        pairs = [
            (a, b)
            for a, one in zip(scores, labels, strict=True)
            if one
            for b, zero in zip(scores, labels, strict=True)
            if not zero
        ]
        return float(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))

    labels, colours, shares = [], [], []
    for plan in demo._plan(16, 16, 2, 7, (1024, 1024)):
        image_HWC = demo.render_slide(plan.look, np.random.default_rng(plan.seed)).astype(int)
        tissue_HW = image_HWC[:, :, 0] - image_HWC[:, :, 1] > 30
        labels.append(plan.label == "CE")
        colours.append(image_HWC[tissue_HW].mean(axis=0))
        shares.append(plan.look.striated_share)
    assert area_under_curve(shares, labels) == 1
    for channel in range(3):
        assert 0.2 < area_under_curve([float(colour[channel]) for colour in colours], labels) < 0.8


def test_the_two_textures_have_the_same_mean_and_spread() -> None:
    striated, granular = demo_render._textures(np.random.default_rng(0))
    assert abs(striated.mean() - granular.mean()) < 0.01
    assert abs(striated.std() - granular.std()) < 0.01
    coherences = []
    for texture in (striated, granular):
        along_y, along_x = np.gradient(texture[:256, :256])
        tensor = np.cov(along_y.ravel(), along_x.ravel())
        low, high = np.linalg.eigvalsh(tensor)
        coherences.append(high / low)
    assert coherences[0] > 2 * coherences[1], "one has a direction, the other has none"


def test_a_slide_of_twenty_megapixels_has_three_levels(tmp_path: Path) -> None:
    plan = demo._plan(2, 2, 1, 7, (5120, 4096))[0]
    demo._write_slide(plan, tmp_path)
    with open_slide(tmp_path / f"{plan.image_id}.tif") as slide:
        assert slide.size_px == (5120, 4096)
        assert slide.level_count == 3


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopped_half_way_nothing_is_left(tmp_path: Path, stop: signal.Signals) -> None:
    with subprocess.Popen(
        [*COMMAND, "--out", str(tmp_path / "set"), "--size", "3500x3500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline_s = time.monotonic() + 60
        while not list(tmp_path.glob(".set.partial-*/train/*.tif")):
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        os.killpg(process.pid, stop)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == (130 if stop == signal.SIGINT else 143)
    assert "Traceback" not in stderr
    assert stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_says_how_it_was_made(demo_dir: Path) -> None:
    manifest = json.loads((demo_dir / demo.MANIFEST).read_text())
    assert manifest["format"] == "clotline.demo"
    assert (manifest["slides"], manifest["seed"]) == (4, 3)
