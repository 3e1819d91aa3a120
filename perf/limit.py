"""python -m perf limit --repository runs/perf/resnet18

LIMIT: what this machine can do with a classifier at all. The same decoding and resizing (`slides.decode.decode_tile`; JPEG by
libjpeg-turbo, unless --limit-decoder says otherwise) and the same network file run in a bare loop, no server, no network, in several layouts of processes, threads and
tiles at a time. The layout with the most tiles a second is the limit of throughput; the one that answers a single tile
soonest is the limit of latency.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from perf.errors import PerfError, PerfInputError
from perf.machine import cores, machine
from perf.served_work import ServedWork, served_work
from perf.tiles import benchmark_tiles, tiles_in
from slides.native import DECODERS, SWITCH_VARIABLE

READY_S = 120.0


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the bare loop uses the machine.

    Attributes:
        processes: loops side by side.
        threads: of the network, in each.
        batch: tiles that the network gets at once.
        spin: whether the network's idle threads wait by spinning.
    """

    processes: int
    threads: int
    batch: int = 1
    spin: bool = True

    def __str__(self) -> str:
        return (
            f"{self.processes} x {self.threads} thread{'s' if self.threads > 1 else ''}, {self.batch} at a time"
            + ("" if self.spin else ", no spinning")
        )


@dataclasses.dataclass(frozen=True)
class Sample:
    """One measurement of a layout.

    Attributes:
        tiles_per_s: of all its processes together.
        cpu_s_per_1000: CPU seconds for 1,000 tiles.
        call_ms: median time of one call of the loop.
        mean_call_ms: its mean.
    """

    tiles_per_s: float
    cpu_s_per_1000: float
    call_ms: float
    mean_call_ms: float


def throughput_layouts(count: int) -> list[Layout]:
    """Layouts worth trying on a machine of `count` cores for the most tiles a second."""
    layouts = [Layout(count, 1), Layout(count, 1, 2), Layout(count, 1, 4)]
    if count > 1:
        layouts += [Layout(1, count), Layout(1, count, spin=False)]
    if count >= 4 and count % 2 == 0:
        layouts.append(Layout(count // 2, 2, spin=False))
    return layouts


def latency_layouts(count: int) -> list[Layout]:
    """Layouts worth trying for the soonest answer to a single tile."""
    return [Layout(1, 1)] if count == 1 else [Layout(1, count), Layout(1, count, spin=False)]


class Loop:
    """The processes of one layout, ready to be measured; between measurements they cost nothing.

    Raises:
        PerfError: a process could not open the network, or ended.
        PerfInputError: the decoder that LIMIT is to use is not there.
    """

    def __init__(self, work: ServedWork, layout: Layout, tile_files: Sequence[Path]) -> None:
        self.layout = layout
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "perf.limit_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).resolve().parent.parent,
                env={**os.environ, SWITCH_VARIABLE: "on" if work.decoder == DECODERS[1] else "off"},
            )
            for _ in range(layout.processes)
        ]
        watchdog = threading.Timer(READY_S, self._kill)
        watchdog.start()
        try:
            for number, process in enumerate(self._processes):
                order = {
                    "runtime": work.runtime,
                    "path": str(work.path),
                    "input": work.input,
                    "probabilities": work.probabilities,
                    "input_size_px": work.input_size_px,
                    "threads": layout.threads,
                    "batch": layout.batch,
                    "spin": layout.spin,
                    "first": number * len(tile_files) // layout.processes,
                    "tiles": [str(path.resolve()) for path in tile_files],
                }
                self._tell(process, order)
            answers = [self._hear(process) for process in self._processes]
        except BaseException:
            self.close()
            raise
        finally:
            watchdog.cancel()
        if any(answer["decoder"] != work.decoder for answer in answers):
            self.close()
            raise PerfInputError(
                f"{work.decoder} is not here to decode with: python -m slides.native compiles it."
            )
        self.probabilities: list[list[float]] = answers[0]["probabilities"]

    def run(self, seconds: float) -> Sample:
        """Let all processes loop for `seconds`."""
        for process in self._processes:
            self._tell(process, {"seconds": seconds})
        heard = [self._hear(process) for process in self._processes]
        tiles = sum(each["tiles"] for each in heard)
        calls_s = [call for each in heard for call in each["calls_s"]]
        return Sample(
            tiles_per_s=sum(each["tiles"] / each["seconds"] for each in heard),
            cpu_s_per_1000=1000 * sum(each["cpu_s"] for each in heard) / tiles,
            call_ms=1000 * statistics.median(calls_s),
            mean_call_ms=1000 * statistics.fmean(calls_s),
        )

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe:
                    with contextlib.suppress(OSError):  # it has gone already
                        pipe.close()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> Loop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()

    def _tell(self, process: subprocess.Popen[str], document: dict[str, Any]) -> None:
        assert process.stdin  # noqa: S101  opened above
        try:
            process.stdin.write(json.dumps(document) + "\n")
            process.stdin.flush()
        except OSError as error:
            raise self._ended(process) from error

    def _hear(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout  # noqa: S101  opened above
        line = process.stdout.readline()
        if not line:
            raise self._ended(process)
        return dict(json.loads(line))

    @staticmethod
    def _ended(process: subprocess.Popen[str]) -> PerfError:
        said = (process.stderr.read() if process.stderr else "").strip().splitlines()
        return PerfError(f"a process of the bare loop ended: {said[-1] if said else 'it said nothing'}")


def best(loops: dict[Layout, list[Sample]], *, by_latency: bool) -> Layout:
    """The layout with the best median over its samples."""
    if by_latency:
        return min(loops, key=lambda layout: statistics.median(s.mean_call_ms for s in loops[layout]))
    return max(loops, key=lambda layout: statistics.median(s.tiles_per_s for s in loops[layout]))


def try_layouts(
    work: ServedWork, layouts: Sequence[Layout], tile_files: Sequence[Path], seconds: float, rounds: int
) -> dict[Layout, list[Sample]]:
    """Measure the layouts in turns."""
    samples: dict[Layout, list[Sample]] = {layout: [] for layout in layouts}
    loops: list[Loop] = []
    try:
        for layout in layouts:
            loops.append(Loop(work, layout, tile_files))
        with tqdm(total=rounds * len(loops), unit="run", desc="limit", leave=False) as progress:
            for _ in range(rounds):
                for loop in loops:
                    samples[loop.layout].append(loop.run(seconds))
                    progress.update()
    finally:
        for loop in loops:
            loop.close()
    return samples


def write_tiles(directory: str, tiles: Sequence[bytes]) -> list[Path]:
    """Tiles as files of a scratch directory, which the processes of the loop read."""
    paths = [Path(directory, f"{number:03d}") for number in range(len(tiles))]
    for path, tile in zip(paths, tiles, strict=True):
        path.write_bytes(tile)
    return paths


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """What `limit` and `bench` both need to know of the work."""
    parser.add_argument(
        "--repository", type=Path, required=True, metavar="DIR", help="model repository, or a Release"
    )
    parser.add_argument(
        "--classifier", default="tile_classifier", metavar="NAME", help="which one (default %(default)s)"
    )
    parser.add_argument(
        "--tiles", type=Path, metavar="DIR", help="these JPEG and PNG tiles, not made-up ones"
    )
    parser.add_argument(
        "--tile-size-px",
        type=int,
        default=512,
        metavar="N",
        help="side of the made-up ones (default %(default)s)",
    )
    parser.add_argument(
        "--limit-decoder",
        choices=DECODERS,
        default=DECODERS[0],
        help="what LIMIT decodes JPEG tiles with; the server takes slides.native where it was compiled (default %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=float, default=4.0, metavar="S", help="of one run (default %(default)s)"
    )


def work_tiles(options: argparse.Namespace) -> list[bytes]:
    """The tiles that the options ask for; raises PerfInputError."""
    if options.seconds <= 0:
        raise PerfInputError(f"--seconds must be more than 0, not {options.seconds}.")
    return tiles_in(options.tiles) if options.tiles else benchmark_tiles(16, options.tile_size_px)


def about_tiles(tiles: Sequence[bytes]) -> dict[str, int]:
    """What an answer tells of them: decoding takes as long as a tile has bytes."""
    return {"count": len(tiles), "mean_bytes": round(sum(map(len, tiles)) / len(tiles))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `limit`."""
    add_work_arguments(parser)
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="alternating (default %(default)s)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`limit`; raises PerfError."""
    if options.rounds < 1:
        raise PerfInputError(f"--rounds must be at least 1, not {options.rounds}.")
    work = served_work(options.repository, options.classifier, options.limit_decoder)
    tiles = work_tiles(options)
    count = cores()
    layouts = list(dict.fromkeys([*throughput_layouts(count), *latency_layouts(count)]))
    with tempfile.TemporaryDirectory(prefix="clotline-limit-") as scratch:
        samples = try_layouts(work, layouts, write_tiles(scratch, tiles), options.seconds, options.rounds)
    rows = {layout: median_sample(found) for layout, found in samples.items()}
    for layout, row in rows.items():
        print(
            f"{layout!s:44}{row.tiles_per_s:8.1f} tiles/s{row.cpu_s_per_1000:8.2f} CPU s/1000{row.call_ms:9.2f} ms a call",
            file=sys.stderr,
        )
    fastest = best(samples, by_latency=False)
    soonest = best({layout: samples[layout] for layout in latency_layouts(count)}, by_latency=True)
    return {
        "model": work.path.parent.parent.name,
        "runtime": work.runtime,
        "limit_decoder": work.decoder,
        "layout": dataclasses.asdict(fastest),
        "tiles_per_s": round(rows[fastest].tiles_per_s, 3),
        "limit_cpu_s_per_1000": round(rows[fastest].cpu_s_per_1000, 3),
        "latency_layout": dataclasses.asdict(soonest),
        "latency_ms": round(rows[soonest].mean_call_ms, 3),
        "layouts": [
            {**dataclasses.asdict(layout), **{k: round(v, 3) for k, v in dataclasses.asdict(row).items()}}
            for layout, row in rows.items()
        ],
        "tiles": about_tiles(tiles),
        "rounds": options.rounds,
        "machine": machine(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def median_sample(samples: Sequence[Sample]) -> Sample:
    """Medians, number by number."""
    names = [field.name for field in dataclasses.fields(Sample)]
    return Sample(**{name: statistics.median(getattr(s, name) for s in samples) for name in names})
