"""python -m training tile --data DIR --out STORE --recipe R

Cut all slides of DIR (train.csv beside train/) into a tile store: the tiles of every slide with an index over them all,
a picture of each slide with its tissue and tiles, and a contact sheet. Size, resolution and number of tiles are those of
the recipe's [spec], or are given one by one. Killed and started again it goes on where it was. A slide that cannot be used
is listed with its reason in the index and in STORE/report.html; the others go on. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path
from typing import Any

from slides.spec import ModelSpec
from training.errors import RecipeError, StoreError
from training.store.spec import ALL_TILES, STAIN_METHODS, StoreSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="folder with train.csv and train/"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="STORE", help="folder of the store")
    parser.add_argument("--recipe", metavar="R", help="name or TOML file; its [spec] says how tiles are cut")
    cut = parser.add_argument_group("how tiles are cut (each wins over the recipe)")
    cut.add_argument("--class-names", metavar="A,B", help="labels in train.csv")
    cut.add_argument("--tile-size", type=int, metavar="PX", help="side of a tile in its own pixels")
    cut.add_argument("--um-per-px", type=float, metavar="UM", help="resolution of tiles")
    cut.add_argument(
        "--tiles-per-slide", type=_tiles, metavar="N", help="the most tissue-rich N of a slide, or `all`"
    )
    cut.add_argument("--min-tissue", type=float, metavar="SHARE", help="least share of tissue (default 0.5)")
    cut.add_argument("--jpeg-quality", type=int, metavar="Q", help="1 to 100 (default 90)")
    cut.add_argument(
        "--slide-um-per-px", type=float, metavar="UM", help="resolution of slides that state none"
    )
    cut.add_argument(
        "--stain-normalise",
        choices=STAIN_METHODS[1:],
        help="move the colours of all tiles to a reference; clients do not do that with the tiles they send",
    )
    cut.add_argument(
        "--stain-reference",
        type=Path,
        metavar="IMAGE",
        help="JPEG or PNG of well stained tissue (reinhard needs one)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if any slide cannot be used")
    parser.add_argument("--overwrite", action="store_true", help="cut anew what STORE holds")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Cut, and say what is there now."""
    from training.store.writer import write_store

    started_s = time.monotonic()
    reference = None
    if options.stain_reference is not None:
        from training.store.stain import read_reference

        reference = read_reference(options.stain_reference)
    spec, class_names = _asked_for(options, reference)
    if options.stain_normalise is not None:
        from training.store.stain import StainNormaliser

        StainNormaliser(
            options.stain_normalise, reference
        )  # a useless reference is refused before the first slide
    if options.workers is not None and options.workers < 1:
        raise StoreError("--workers", [f"must be 1 or more, not {options.workers}"])
    report = write_store(
        options.data,
        options.out,
        spec,
        class_names=class_names,
        workers_count=options.workers or _usable_cores(),
        stain_reference=reference,
        overwrite=options.overwrite,
    )
    wall_s = time.monotonic() - started_s
    for slide in report.failed:
        print(f"failed: {slide['image_id']}: {slide['reason']}", file=sys.stderr)
    summary = report.summary
    answer = {
        "store": str(options.out),
        "slides": len(summary["slides"]),
        "failed": len(report.failed),
        "tiles": summary["tiles"],
        "bytes": sum(slide["bytes"] for slide in summary["slides"]),
        "cut_slides": report.cut_slides,
        "cut_tiles": report.cut_tiles,
        "tiles_per_s": round(report.cut_tiles / wall_s, 1),
        "fingerprint": summary["fingerprint"],
        "report": str(options.out / "report.html"),
        "wall_s": round(wall_s, 2),
    }
    if spec.stain_normalise != "none":
        answer["stain_kept"] = summary["tiles"] - sum(
            slide["stain_normalised"] for slide in summary["slides"]
        )
    if options.strict and report.failed:
        answer["exit_code"] = 1
    return answer


def _asked_for(options: argparse.Namespace, reference: bytes | None) -> tuple[StoreSpec, tuple[str, ...]]:
    values: dict[str, Any] = {
        "tile_size_px": options.tile_size,
        "um_per_px": options.um_per_px,
        "tiles_per_slide": options.tiles_per_slide,
        "min_tissue_share": options.min_tissue,
        "jpeg_quality": options.jpeg_quality,
        "stain_normalise": options.stain_normalise,
        "stain_reference_sha256": hashlib.sha256(reference).hexdigest() if reference else None,
        "slide_um_per_px": options.slide_um_per_px,
    }
    given = {name: value for name, value in values.items() if value is not None}
    class_names = tuple(options.class_names.split(",")) if options.class_names else None
    if reference is not None and options.stain_normalise is None:
        raise StoreError("--stain-reference", ["is of no use without --stain-normalise"])
    if options.recipe is not None:
        model_spec = _spec_of_recipe(options.recipe)
        return StoreSpec.of_model(model_spec, **given), class_names or model_spec.class_names
    given = {"min_tissue_share": 0.5, "tiles_per_slide": ALL_TILES, **given}
    missing = [
        flag
        for flag, value in (
            ("--tile-size", options.tile_size),
            ("--um-per-px", options.um_per_px),
            ("--class-names", class_names),
        )
        if value is None
    ]
    if missing or class_names is None:
        raise StoreError("how tiles are cut", [f"give --recipe, or {', '.join(missing)}"])
    return StoreSpec(**given), class_names


def _spec_of_recipe(name: str) -> ModelSpec:
    from training import recipe

    plan = recipe.load(name)
    if plan.source == "tiles":
        raise RecipeError(
            f"recipe {name!r}", ['source: is "tiles": they come ready cut, there is nothing to tile']
        )
    return plan.spec


def _tiles(text: str) -> int:
    if text == "all":
        return ALL_TILES
    if not text.isdigit() or not 1 <= int(text) <= ALL_TILES:
        raise argparse.ArgumentTypeError(f"{text!r} is neither `all` nor a number from 1 to {ALL_TILES}")
    return int(text)


def _usable_cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
