"""python -m training.benchmarks tiling

Tiles a second of the store's writer, from slide files to a finished store, against the limit: a bare loop in which the
same number of processes reads the same regions of the same slides through openslide and throws them away. Both are
measured in turn, process start included, and the best of each counts. The slides are made-up ones (`slides.demo`), JPEG
tiled and pyramidal, taken as 40x scans.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

REQUIRED_RATIO = 0.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slides", type=int, default=12, metavar="N", help="slides to cut (default 12)")
    parser.add_argument(
        "--different", type=int, default=2, metavar="N", help="others link to these (default 2)"
    )
    parser.add_argument(
        "--side", type=int, default=16384, metavar="PX", help="width of a slide (default 16384)"
    )
    parser.add_argument(
        "--slide-um-per-px", type=float, default=0.25, metavar="UM", help="default 0.25 (40x)"
    )
    parser.add_argument("--tile-size", type=int, default=256, metavar="PX", help="default 256")
    parser.add_argument("--um-per-px", type=float, default=0.5, metavar="UM", help="of tiles (default 0.5)")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="turns of both (default 3)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure both; `passed` is ratio >= REQUIRED_RATIO."""
    from slides.demo import make_demo_slides
    from training.store.reader import TileStore
    from training.store.spec import ALL_TILES, StoreSpec
    from training.store.writer import write_store

    spec = StoreSpec(
        tile_size_px=options.tile_size,
        um_per_px=options.um_per_px,
        tiles_per_slide=ALL_TILES,
        min_tissue_share=0.5,
        slide_um_per_px=options.slide_um_per_px,
    )
    folder = Path(tempfile.mkdtemp(prefix="clotline-tiling-"))
    try:
        data_dir = make_demo_slides(
            folder / "data",
            slides=options.different,
            patients=options.different,
            centers=1,
            size_px=(options.side, options.side * 3 // 4),
            workers=options.workers,
        )
        _link_slides(data_dir, options.slides)
        store_dir, walls_s, limits_s = folder / "store", [], []
        regions: list[tuple[Path, Sequence[tuple[int, int]], int, int]] = []
        for turn in tqdm(range(options.repeats), desc="measuring", unit="turn", file=sys.stderr):
            shutil.rmtree(store_dir, ignore_errors=True)
            started_s = time.perf_counter()
            write_store(
                data_dir,
                store_dir,
                spec,
                class_names=("CE", "LAA"),
                workers_count=options.workers,
                show_progress=False,
            )
            walls_s.append(time.perf_counter() - started_s)
            store = TileStore.open(store_dir)
            if turn == 0:
                regions = [_regions(store, number) for number in range(len(store.slides))]
                regions.sort(key=lambda region: -region[0].stat().st_size)
            limits_s.append(_bare_loop_s(regions, options.workers))
        tiles = len(store)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ratio = min(limits_s) / min(walls_s)
    return {
        "benchmark": "tiling",
        "passed": ratio >= REQUIRED_RATIO,
        "ratio": round(ratio, 3),
        "required_ratio": REQUIRED_RATIO,
        "tiles_per_s": round(tiles / min(walls_s), 1),
        "limit_tiles_per_s": round(tiles / min(limits_s), 1),
        "ratios_of_turns": [
            round(limit_s / wall_s, 3) for limit_s, wall_s in zip(limits_s, walls_s, strict=True)
        ],
        "tiles": tiles,
        "slides": options.slides,
        "region_px": regions[0][3],
        "tile_size_px": options.tile_size,
        "workers": options.workers,
        "cores": os.cpu_count(),
    }


def _link_slides(data_dir: Path, count: int) -> None:
    """More rows and links to the slides that are there: rendering takes longer than reading."""
    header, *rows = (data_dir / "train.csv").read_text().splitlines()
    different = list(rows)
    for number in range(len(rows), count):
        image_id, center_id, _, image_num, label = different[number % len(different)].split(",")
        (data_dir / "train" / f"link{number}.tif").hardlink_to(data_dir / "train" / f"{image_id}.tif")
        rows.append(f"link{number},{center_id},link{number},{image_num},{label}")
    (data_dir / "train.csv").write_text("\n".join([header, *rows]) + "\n")


def _regions(store: Any, number: int) -> tuple[Path, list[tuple[int, int]], int, int]:
    """Slide, corners at level 0, the level that is read and the side of a region in its pixels."""
    record = store.slides[number]
    rows = store.rows_of(record.image_id)
    part = store.index.slice(rows.start, len(rows))
    corners = list(zip(part.column("x_px").to_pylist(), part.column("y_px").to_pylist(), strict=True))
    level, side_px = part.column("level")[0].as_py(), part.column("side_px")[0].as_py()
    width_px = store.summary["slides"][number]["width_px"]
    import openslide

    with openslide.OpenSlide(record.path) as slide:
        side_px = round(side_px * slide.level_dimensions[level][0] / width_px)
    return record.path, corners, level, side_px


def _bare_loop_s(regions: Sequence[tuple[Path, Sequence[tuple[int, int]], int, int]], workers: int) -> float:
    started_s = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for done in [pool.submit(_read_regions, *region) for region in regions]:
            done.result()
    return time.perf_counter() - started_s


def _read_regions(path: Path, corners: Sequence[tuple[int, int]], level: int, side_px: int) -> int:
    import numpy as np
    import openslide

    total = 0
    with openslide.OpenSlide(path) as slide:
        for corner in corners:
            total += np.asarray(slide.read_region(corner, level, (side_px, side_px))).shape[0]
    return total
