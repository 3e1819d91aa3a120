"""python -m training.benchmarks containers

Why the tile store is made of Arrow IPC files: microseconds a tile of reading the same JPEG tiles in order and at random
from several containers, cold (dropped from the page cache before) and warm. The limit is reading bytes at known offsets.
`passed` says that Arrow reads at random, cold, no slower than every other container.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import sqlite3
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from training.benchmarks.material import make_tiles

TILES_A_FILE = 1000
ROWS_A_BATCH = 64

Get: TypeAlias = Callable[[int], bytes]
"""Tile n of a container that was opened."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tiles", type=int, default=20_000, metavar="N", help="tiles (default 20000)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Write and read all containers."""
    count = max(TILES_A_FILE, options.tiles - options.tiles % TILES_A_FILE)
    orders = {"in_order": list(range(count)), "random": random.Random(0).sample(range(count), count)}  # noqa: S311
    measured: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="clotline-containers-") as folder:
        made = make_tiles(Path(folder) / "tiles", patients=10, tiles_a_patient=20, side_px=256)
        source = [path.read_bytes() for path in sorted((made / "train").iterdir())]
        tiles = [source[number % len(source)] for number in range(count)]
        for name, (write, read) in tqdm(_CONTAINERS.items(), unit="container", file=sys.stderr):
            directory = Path(folder) / name
            directory.mkdir()
            started_s = time.perf_counter()
            offsets = write(directory, tiles)
            os.sync()
            measured[name] = {"write_s": round(time.perf_counter() - started_s, 2)}
            for state in ("cold", "warm"):
                for order_name, order in orders.items():
                    if state == "cold":
                        _drop_from_cache(directory)
                    taken = order[:2000] if name == "parquet" and order_name == "random" else order
                    with contextlib.ExitStack() as closing:
                        us = _us_a_tile(read(directory, offsets, closing), taken, tiles)
                    measured[name][f"{state}_{order_name}_us"] = us
    others = [values["cold_random_us"] for name, values in measured.items() if name != "arrow"]
    return {
        "benchmark": "containers",
        "passed": measured["arrow"]["cold_random_us"] <= min(others),
        "tiles": count,
        "tile_bytes": round(sum(map(len, tiles)) / count),
        "containers": measured,
        "cores": os.cpu_count(),
    }


def _us_a_tile(get: Get, order: Sequence[int], tiles: Sequence[bytes]) -> float:
    started_s = time.perf_counter()
    for number in order:
        data = get(number)
    us = (time.perf_counter() - started_s) / len(order) * 1e6
    if data != tiles[order[-1]]:
        raise RuntimeError("a container gave back another tile than was asked for")
    return round(us, 1)


def _drop_from_cache(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _files_of(tiles: Sequence[bytes]) -> range:
    return range(len(tiles) // TILES_A_FILE)


def _write_arrow(directory: Path, tiles: Sequence[bytes]) -> None:
    schema = pa.schema([("tile", pa.binary())])
    for file in _files_of(tiles):
        of_file = tiles[file * TILES_A_FILE : (file + 1) * TILES_A_FILE]
        with pa.ipc.new_file(str(directory / f"{file}.arrow"), schema) as writer:
            for first in range(0, TILES_A_FILE, ROWS_A_BATCH):
                rows = pa.array(of_file[first : first + ROWS_A_BATCH], pa.binary())
                writer.write_batch(pa.record_batch([rows], schema=schema))


def _read_arrow(directory: Path, _: Any, closing: contextlib.ExitStack) -> Get:
    chunks = []
    for file in range(len(list(directory.iterdir()))):
        source = closing.enter_context(pa.memory_map(str(directory / f"{file}.arrow")))
        chunks.append(pa.ipc.open_file(source).read_all().column("tile").chunks)

    def get(number: int) -> bytes:
        file, row = divmod(number, TILES_A_FILE)
        return bytes(chunks[file][row // ROWS_A_BATCH][row % ROWS_A_BATCH].as_buffer())

    return get


def _write_parquet(directory: Path, tiles: Sequence[bytes]) -> None:
    for file in _files_of(tiles):
        table = pa.table({"tile": tiles[file * TILES_A_FILE : (file + 1) * TILES_A_FILE]})
        path = directory / f"{file}.parquet"
        pq.write_table(table, path, compression="none", row_group_size=ROWS_A_BATCH, use_dictionary=False)


def _read_parquet(directory: Path, _: Any, closing: contextlib.ExitStack) -> Get:
    files = [
        closing.enter_context(pq.ParquetFile(directory / f"{file}.parquet", memory_map=True))
        for file in range(len(list(directory.iterdir())))
    ]
    last: dict[tuple[int, int], Any] = {}

    def get(number: int) -> bytes:
        file, row = divmod(number, TILES_A_FILE)
        group = (file, row // ROWS_A_BATCH)
        if group not in last:
            last.clear()
            last[group] = files[file].read_row_group(group[1]).column("tile")
        value: bytes = last[group][row % ROWS_A_BATCH].as_py()
        return value

    return get


def _write_files(directory: Path, tiles: Sequence[bytes]) -> None:
    for number, tile in enumerate(tiles):
        folder = directory / str(number // TILES_A_FILE)
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(tile)


def _read_files(directory: Path, _: Any, closing: contextlib.ExitStack) -> Get:
    return lambda number: (directory / str(number // TILES_A_FILE) / f"{number}.jpg").read_bytes()


def _write_tar(directory: Path, tiles: Sequence[bytes]) -> list[tuple[int, int, int]]:
    offsets = []
    for file in _files_of(tiles):
        with tarfile.open(directory / f"{file}.tar", "w") as archive:
            for number in range(file * TILES_A_FILE, (file + 1) * TILES_A_FILE):
                member = tarfile.TarInfo(f"{number}.jpg")
                member.size = len(tiles[number])
                offsets.append((file, archive.offset + tarfile.BLOCKSIZE, member.size))
                archive.addfile(member, io.BytesIO(tiles[number]))
    return offsets


def _read_tar(directory: Path, offsets: Any, closing: contextlib.ExitStack) -> Get:
    files = [
        closing.enter_context((directory / f"{file}.tar").open("rb"))
        for file in range(len(list(directory.iterdir())))
    ]

    def get(number: int) -> bytes:
        file, offset, size = offsets[number]
        return os.pread(files[file].fileno(), size, offset)

    return get


def _write_sqlite(directory: Path, tiles: Sequence[bytes]) -> None:
    with contextlib.closing(sqlite3.connect(directory / "tiles.db")) as database, database:
        database.execute("CREATE TABLE tiles (number INTEGER PRIMARY KEY, data BLOB)")
        database.executemany("INSERT INTO tiles VALUES (?, ?)", enumerate(tiles))


def _read_sqlite(directory: Path, _: Any, closing: contextlib.ExitStack) -> Get:
    database = closing.enter_context(contextlib.closing(sqlite3.connect(directory / "tiles.db")))

    def get(number: int) -> bytes:
        row = database.execute("SELECT data FROM tiles WHERE number = ?", (number,)).fetchone()
        return bytes(row[0])

    return get


_CONTAINERS: dict[str, tuple[Callable[..., Any], Callable[..., Get]]] = {
    "arrow": (_write_arrow, _read_arrow),
    "parquet": (_write_parquet, _read_parquet),
    "files": (_write_files, _read_files),
    "tar_with_offsets": (_write_tar, _read_tar),
    "sqlite": (_write_sqlite, _read_sqlite),
}
