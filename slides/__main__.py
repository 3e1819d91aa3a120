"""python -m slides demo --out DIR
python -m slides inspect SLIDE --out PNG

`demo` writes made-up slides with labels; `inspect` draws what is taken for tissue and which tiles would be
cut. The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slides.errors import SlidesError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 wrong usage or input, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        answer = options.run(options)
    except (SlidesError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(json.dumps(answer, separators=(",", ":")))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slides", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="write made-up slides with labels",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    demo.add_argument("--slides", type=int, default=30, metavar="N", help="number of slides")
    demo.add_argument("--patients", type=int, default=20, metavar="N", help="number of patients")
    demo.add_argument("--centers", type=int, default=3, metavar="N", help="number of centres")
    demo.add_argument("--seed", type=int, default=7, metavar="N", help="same seed, same bytes")
    demo.add_argument("--size", type=_size, default="5120x4096", metavar="WxH", help="pixels of a slide")
    demo.add_argument("--overwrite", action="store_true", help="replace demo slides made otherwise")
    demo.add_argument("--workers", type=int, default=2, metavar="N", help="processes")
    demo.set_defaults(run=_demo)

    look = commands.add_parser(
        "inspect",
        help="draw tissue and tiles over a thumbnail",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    look.add_argument("slide", type=Path, metavar="SLIDE", help="slide file")
    look.add_argument("--out", type=Path, required=True, metavar="PNG", help="picture to write")
    look.add_argument("--um-per-px", type=float, metavar="UM", help="resolution of the slide, if it has none")
    look.add_argument(
        "--tile-size", type=int, default=256, metavar="PX", help="side of a tile in its own pixels"
    )
    look.add_argument("--tile-um-per-px", type=float, default=0.5, metavar="UM", help="resolution of tiles")
    look.add_argument("--tiles", type=int, default=24, metavar="K", help="tiles to take")
    look.add_argument("--min-tissue", type=float, default=0.5, metavar="SHARE", help="least share of tissue")
    look.add_argument("--side", type=int, default=1600, metavar="PX", help="longer side of the picture")
    look.set_defaults(run=_inspect)
    return parser


def _size(text: str) -> tuple[int, int]:
    width, separator, height = text.partition("x")
    if not separator or not width.isdigit() or not height.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, for instance 5120x4096")
    return int(width), int(height)


def _demo(options: argparse.Namespace) -> dict[str, Any]:
    from slides.demo import make_demo_slides

    out_dir = make_demo_slides(
        options.out,
        slides=options.slides,
        patients=options.patients,
        centers=options.centers,
        seed=options.seed,
        size_px=options.size,
        overwrite=options.overwrite,
        workers=options.workers,
    )
    total_bytes = sum(path.stat().st_size for path in (out_dir / "train").iterdir())
    return {
        "data": str(out_dir),
        "slides": options.slides,
        "patients": options.patients,
        "bytes": total_bytes,
    }


def _inspect(options: argparse.Namespace) -> dict[str, Any]:
    from slides.inspection import draw_inspection
    from slides.reader import open_slide
    from slides.spec import ModelSpec

    spec = ModelSpec(
        class_names=("unused", "unused too"),
        tile_size_px=options.tile_size,
        um_per_px=options.tile_um_per_px,
        input_size_px=options.tile_size,
        tiles_per_slide=options.tiles,
        min_tissue_share=options.min_tissue,
    )
    if options.out.suffix.lower() != ".png":
        raise SlidesError(f"--out {options.out}: the picture is a PNG; name it so")
    if options.side < 16:
        raise SlidesError(f"--side {options.side}: the picture needs 16 px or more")
    with open_slide(options.slide, um_per_px=options.um_per_px) as slide:
        picture_png, answer = draw_inspection(slide, spec, options.side)
    aside = options.out.with_name(f".{options.out.name}.{os.getpid()}")
    try:
        aside.write_bytes(picture_png)
        os.replace(aside, options.out)
    finally:
        aside.unlink(missing_ok=True)
    return {**answer, "picture": str(options.out)}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is half-written is removed on the way out
    sys.exit(main())
