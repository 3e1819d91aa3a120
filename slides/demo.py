"""Made-up slides in the layout of STRIP AI, to try everything without the real data.

A slide is a pyramidal, tiled JPEG TIFF at 0.5 um/px that openslide opens; `slides.demo_render` says what is
on it. The same arguments give the same bytes.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import tifffile
from tqdm import tqdm

from slides.demo_render import EOSIN, SlideLook, render_slide
from slides.errors import DemoError

CLASS_NAMES = ("CE", "LAA")
STRIATED_SHARES = (0.76, 0.24)
UM_PER_PX = 0.5
MANIFEST = "demo.json"
GENERATOR_VERSION = 1


class _Plan(NamedTuple):
    image_id: str
    center_id: str
    patient_id: str
    image_num: int
    label: str
    seed: tuple[int, int]
    look: SlideLook


def make_demo_slides(
    out_dir: Path | str,
    *,
    slides: int = 30,
    patients: int = 20,
    centers: int = 3,
    seed: int = 7,
    size_px: tuple[int, int] = (5120, 4096),
    overwrite: bool = False,
    workers: int = 2,
) -> Path:
    """Write train.csv and train/<image_id>.tif, all of it or nothing.

    Args:
        out_dir: folder to make. A complete set with the same arguments in it is kept as it is.
        slides, patients, centers: how many; slides >= patients >= 2 * centers. Half of each centre's patients
            have each label, so the centre's stain says nothing about it.
        seed: everything random follows from it.
        size_px: width and height of a slide, 1024..100,000 px.
        overwrite: replace a set that was made with other arguments.
        workers: processes.

    Returns:
        `out_dir`.

    Raises:
        DemoError: impossible numbers, something else is in `out_dir`, or it cannot be written.
    """
    out_dir = Path(out_dir)
    parameters = {
        "format": "clotline.demo",
        "version": GENERATOR_VERSION,
        "slides": slides,
        "patients": patients,
        "centers": centers,
        "seed": seed,
        "size_px": list(size_px),
    }
    _check_numbers(slides, patients, centers, seed, size_px)
    if _is_complete(out_dir, parameters):
        return out_dir
    if out_dir.is_dir() and any(out_dir.iterdir()):
        if not (out_dir / MANIFEST).is_file():
            raise DemoError(f"{out_dir}: holds something other than demo slides; choose another folder")
        if not overwrite:
            raise DemoError(
                f"{out_dir}: holds demo slides made with other arguments, or incomplete ones; "
                "choose another folder, or replace them with --overwrite"
            )
    plans = _plan(slides, patients, centers, seed, size_px)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.partial-", dir=out_dir.parent))
    except OSError as error:
        raise DemoError(f"{out_dir}: cannot be made: {error}") from error
    try:
        aside.chmod(0o755)
        (aside / "train").mkdir()
        _render_all(plans, aside / "train", workers)
        _write_labels(plans, aside / "train.csv")
        sizes = {path.name: path.stat().st_size for path in sorted((aside / "train").iterdir())}
        (aside / MANIFEST).write_text(json.dumps({**parameters, "bytes": sizes}, indent=1) + "\n")
        _replace(out_dir, aside)
    except OSError as error:
        raise DemoError(f"{out_dir}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out_dir


def _check_numbers(slides: int, patients: int, centers: int, seed: int, size_px: tuple[int, int]) -> None:
    problems = []
    if centers < 1 or patients < 2 * centers or slides < patients:
        problems.append(
            f"slides >= patients >= 2 * centers >= 2 is needed, not {slides} slides, {patients} patients, "
            f"{centers} centers"
        )
    if len(size_px) != 2 or not all(1024 <= side <= 100_000 for side in size_px):
        problems.append(f"size_px must be two sides from 1024 to 100000, not {size_px}")
    if seed < 0:
        problems.append(f"seed must not be negative, not {seed}")
    if problems:
        raise DemoError("demo slides: " + "; ".join(problems))


def _is_complete(out_dir: Path, parameters: dict[str, Any]) -> bool:
    try:
        manifest = json.loads((out_dir / MANIFEST).read_text())
        sizes = manifest.pop("bytes")
        return bool(
            manifest == parameters
            and (out_dir / "train.csv").is_file()
            and sizes
            and all((out_dir / "train" / name).stat().st_size == size for name, size in sizes.items())
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _replace(out_dir: Path, aside: Path) -> None:
    """Move the finished set into place; what was there goes only after that."""
    old = out_dir.with_name(aside.name + ".old")
    existed = out_dir.exists()
    if existed:
        os.rename(out_dir, old)
    try:
        os.rename(aside, out_dir)
    except BaseException:
        if existed:
            os.rename(old, out_dir)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _plan(slides: int, patients: int, centers: int, seed: int, size_px: tuple[int, int]) -> list[_Plan]:
    rng = np.random.default_rng(seed)
    patient_ids = [f"{number:06x}" for number in rng.choice(16**6, patients, replace=False)]
    stains = EOSIN * rng.uniform((0.6, 0.8, 0.7), (1.4, 1.2, 1.3), (centers, 3))
    glasses = rng.uniform(232, 246, (centers, 1)) + rng.uniform(-3, 3, (centers, 3))
    shares = [STRIATED_SHARES[i % 2] + float(rng.uniform(-0.07, 0.07)) for i in range(patients)]
    plans = []
    for number in range(slides):
        patient = number % patients
        center = patient // 2 % centers
        stain = stains[center] * rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, 3)
        look = SlideLook(
            size_px,
            shares[patient],
            (float(stain[0]), float(stain[1]), float(stain[2])),
            (float(glasses[center][0]), float(glasses[center][1]), float(glasses[center][2])),
        )
        image_num = number // patients
        patient_id = patient_ids[patient]
        plans.append(
            _Plan(
                f"{patient_id}_{image_num}",
                str(center + 1),
                patient_id,
                image_num,
                CLASS_NAMES[patient % 2],
                (seed, number),
                look,
            )
        )
    return sorted(plans, key=lambda plan: plan.image_id)


def _write_labels(plans: list[_Plan], path: Path) -> None:
    with path.open("w", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(("image_id", "center_id", "patient_id", "image_num", "label"))
        table.writerows(plan[:5] for plan in plans)


def _render_all(plans: list[_Plan], folder: Path, workers: int) -> None:
    bar = tqdm(total=len(plans), desc="demo slides", unit="slide", file=sys.stderr)
    with bar, _processes(workers) as pool:
        try:
            for done in as_completed([pool.submit(_write_slide, plan, folder) for plan in plans]):
                done.result()
                bar.update()
        except BrokenProcessPool as error:
            raise DemoError("demo slides: a worker process was killed (memory?); try --workers 1") from error


@contextmanager
def _processes(workers: int) -> Iterator[Executor]:
    """Spawned, because forking a process with threads (a progress bar has one) may deadlock."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max(1, workers), mp_context=context, initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and cancels what has not begun
    cv2.setNumThreads(1)


def _write_slide(plan: _Plan, folder: Path) -> None:
    image_HWC = render_slide(plan.look, np.random.default_rng(plan.seed))
    per_cm = round(10_000 / UM_PER_PX)
    with tifffile.TiffWriter(folder / f"{plan.image_id}.tif") as writer:
        level = 0
        while True:
            writer.write(
                image_HWC,
                photometric="rgb",
                tile=(256, 256),
                compression="jpeg",
                compressionargs={"level": 85},
                resolution=(per_cm / 4**level, per_cm / 4**level),
                resolutionunit="CENTIMETER",
                subfiletype=1 if level else 0,
                metadata=None,
                software="clotline demo",
                maxworkers=1,
            )
            height_px, width_px = image_HWC.shape[:2]
            if max(width_px, height_px) <= 1024:
                break
            smaller_px = (max(1, width_px // 4), max(1, height_px // 4))
            image_HWC = np.asarray(cv2.resize(image_HWC, smaller_px, interpolation=cv2.INTER_AREA), np.uint8)
            level += 1
