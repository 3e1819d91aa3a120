"""python -m perf inputs --out runs/inputs

Writes real JPEG tiles in the form that perf_analyzer reads, so that it can be typed by hand:

    .triton/perf/perf_analyzer -m tile_classifier -i grpc -u 127.0.0.1:8001 \\
        --input-data runs/inputs/tiles.json --concurrency-range 8

and the tiles themselves (tile_00.jpg, ...). In perf_analyzer's JSON the `b64` of a BYTES tensor holds the serialised tensor:
four bytes of length, then the file, as on the wire. Its other form, a directory of files, reads BYTES as lines of
text and therefore cannot hold a JPEG.
"""

from __future__ import annotations

import argparse
import base64
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perf.tiles import benchmark_tiles, photograph_tiles, tiles_in
from perf.whole_file import write_whole

FILENAME = "tiles.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `inputs`."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write into")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--tiles", type=Path, metavar="DIR", help="these JPEG and PNG tiles, not made-up ones"
    )
    source.add_argument(
        "--photographs", type=Path, metavar="DIR", help="tiles cut from these JPEG and PNG photographs"
    )
    parser.add_argument(
        "--count", type=int, default=16, metavar="N",
        help="tiles that are made up (1 to 64) or cut (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--size-px", type=int, default=512, metavar="N", help="their side (default %(default)s)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`inputs`; raises PerfInputError."""
    if options.tiles:
        tiles = tiles_in(options.tiles)
    elif options.photographs:
        tiles = photograph_tiles(options.photographs, options.count, options.size_px)
    else:
        tiles = benchmark_tiles(options.count, options.size_px)
    path = write_inputs(options.out, tiles)
    return {
        "input_data": str(path),
        "tiles": len(tiles),
        "bytes": sum(map(len, tiles)),
        "perf_analyzer": f"perf_analyzer -m tile_classifier -i grpc -u 127.0.0.1:8001 --input-data {path}",
    }


def write_inputs(directory: Path, tiles: Sequence[bytes]) -> Path:
    """Write the tiles and perf_analyzer's JSON of them; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, tile in enumerate(tiles):
        write_whole(directory / f"tile_{number:02d}.jpg", tile)
    data = [{"tile": {"content": {"b64": _serialised(tile)}, "shape": [1]}} for tile in tiles]
    path = directory / FILENAME
    write_whole(path, json.dumps({"data": data}).encode())
    return path


def _serialised(tile: bytes) -> str:
    return base64.b64encode(struct.pack("<I", len(tile)) + tile).decode("ascii")
