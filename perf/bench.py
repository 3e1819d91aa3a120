"""python -m perf bench --repository runs/perf/resnet18

Serves a repository and measures it against LIMIT (`python -m perf limit`), turn by turn, in a closed loop: LIMIT, HTTP,
gRPC, and so on for --rounds rounds. Ratios are taken within a round, and the medians of the rounds are told.
Every answer is compared with that of the bare loop.

Load comes from loops of this package's own (one thread, less than 0.1 ms of CPU time a request). What they use is not counted
as the server's, but it is taken from the same cores. --grpc-load perf_analyzer takes NVIDIA's program for gRPC, which uses
four times as much; its answers cannot be had, so sixteen a round are asked for besides.

--concurrency 1 asks for latency: LIMIT is then the layout that answers a single tile soonest, with all cores.
--limit-repository takes LIMIT from another network: INT8 served, against the limit of FP32.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from perf.analyzer import analyzer_load
from perf.bench_server import BenchServer, serving
from perf.errors import LoadError, PerfInputError
from perf.grpc_load import grpc_load, infer_message, infer_outputs
from perf.http_load import http_load, infer_answer, infer_request
from perf.inputs import write_inputs
from perf.install import perf_analyzer
from perf.limit import (
    Layout,
    Loop,
    Sample,
    about_tiles,
    add_work_arguments,
    best,
    latency_layouts,
    median_sample,
    throughput_layouts,
    try_layouts,
    work_tiles,
    write_tiles,
)
from perf.load import LoadFigures
from perf.machine import cores, machine
from perf.served_work import ServedWork, models_of, served_work
from slides.decode import jpeg_decoder

PROTOCOLS = ("http", "grpc")
GRPC_LOADS = ("own", "perf_analyzer")
OUTPUTS = ("probabilities", "confidence", "label_index")
TOLERANCE = 1e-4
_LAYOUT_TRIAL_S = 1.5


@dataclasses.dataclass(frozen=True)
class Turn:
    """One protocol in one round.

    Attributes:
        load: what the client saw.
        cpu_s_per_1000: CPU seconds of the server's process tree for 1,000 requests.
        load_cpu_s_per_1000: of the load generator.
        ratio_to_limit: requests a second over the round's LIMIT in tiles a second.
        latency_to_limit: mean latency over the round's mean time of a call in the bare loop.
        cpu_ratio: CPU seconds over the round's LIMIT's.
    """

    load: LoadFigures
    cpu_s_per_1000: float
    load_cpu_s_per_1000: float
    ratio_to_limit: float
    latency_to_limit: float
    cpu_ratio: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `bench`."""
    add_work_arguments(parser)
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="alternating (default %(default)s)"
    )
    parser.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="requests in flight (default %(default)s)"
    )
    parser.add_argument(
        "--protocols", default="http,grpc", metavar="LIST", help="of http, grpc (default %(default)s)"
    )
    parser.add_argument(
        "--grpc-load",
        choices=GRPC_LOADS,
        default="own",
        help="where gRPC's load comes from (default %(default)s)",
    )
    parser.add_argument(
        "--limit-repository", type=Path, metavar="DIR", help="LIMIT's network is in this repository"
    )
    parser.add_argument(
        "--limit-classifier", metavar="NAME", help="LIMIT's network is behind this classifier"
    )
    parser.add_argument(
        "--layout",
        metavar="PxTxB",
        help="LIMIT in P processes of T threads, B tiles at a time, e.g. 2x1x1; default: several are tried",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`bench`; raises PerfError."""
    protocols = list(dict.fromkeys(name.strip() for name in options.protocols.split(",")))
    problems = [
        f"--protocols takes {', '.join(PROTOCOLS)}, not {p!r}" for p in protocols if p not in PROTOCOLS
    ]
    problems += [
        f"--{name} must be at least 1, not {value}"
        for name, value in (("rounds", options.rounds), ("concurrency", options.concurrency))
        if value < 1
    ]
    if problems:
        raise PerfInputError("; ".join(problems))
    chosen = layout_of(options.layout) if options.layout else None
    by_analyzer = options.grpc_load == "perf_analyzer" and "grpc" in protocols
    if by_analyzer:
        perf_analyzer()
    work = served_work(options.repository, options.classifier)
    limit_work = served_work(
        options.limit_repository or options.repository,
        options.limit_classifier or options.classifier,
        options.limit_decoder,
    )
    tiles = work_tiles(options)
    with tempfile.TemporaryDirectory(prefix="clotline-bench-") as scratch:
        files = write_tiles(scratch, tiles)
        layout = chosen or _choose_layout(limit_work, files, options.concurrency, options.seconds)
        expected = _expected(work, files)
        with (
            Loop(limit_work, layout, files) as loop,
            serving(models_of(options.repository)) as server,
        ):
            bench = _Bench(
                server,
                work.classifier,
                tiles,
                expected,
                write_inputs(Path(scratch), tiles) if by_analyzer else None,
                options.concurrency,
            )
            bench.check_over("grpc")
            bench.check_over("http")
            limits, turns = _rounds(bench, loop, protocols, options.rounds, options.seconds)
    answer = summary(limits, turns)
    _tell(layout, answer)
    return {
        **answer,
        "protocol": "+".join(protocols),
        "grpc_load": options.grpc_load,
        "concurrency": options.concurrency,
        "model": work.network,
        "limit_model": limit_work.network,
        "limit_decoder": limit_work.decoder,
        "decoder": jpeg_decoder(),
        "layout": dataclasses.asdict(layout),
        "tiles": about_tiles(tiles),
        "rounds": options.rounds,
        "answers_checked": bench.checked,
        "max_abs_diff": bench.max_abs_diff,
        "machine": machine(),
        "load_average": round(os.getloadavg()[0], 2),
    }


class _Bench:
    """A server under load, whose answers are compared with those of the bare loop."""

    def __init__(
        self,
        server: BenchServer,
        model: str,
        tiles: Sequence[bytes],
        expected_NK: NDArray[np.float64],
        input_data: Path | None,
        concurrency: int,
    ) -> None:
        self.server, self.model, self.tiles, self.expected_NK = server, model, tiles, expected_NK
        self.input_data, self.concurrency = input_data, concurrency
        self.requests = [infer_request(model, tile, OUTPUTS, server.http) for tile in tiles]
        self.messages = [infer_message(model, tile, OUTPUTS) for tile in tiles]
        self.checked = 0
        self.max_abs_diff = 0.0

    def turn(self, protocol: str, seconds: float, limit: Sample) -> Turn:
        """Load over one protocol for `seconds`."""
        cpu_from_s, from_count = self.server.cpu_s(), self.server.requests(self.model)
        authority = self.server.http if protocol == "http" else self.server.grpc
        host, _, port = authority.rpartition(":")
        answers: list[tuple[int, Any]] = []
        if protocol == "http":
            load, found = http_load(host, int(port), self.requests, self.concurrency, seconds)
            answers = [(index, infer_answer(answer)) for index, answer in found]
        elif self.input_data is None:
            load, found = grpc_load(host, int(port), self.messages, self.concurrency, seconds)
            answers = [(index, infer_outputs(answer)) for index, answer in found]
        else:
            load = analyzer_load("grpc", authority, self.model, self.input_data, self.concurrency, seconds)
        used_s = self.server.cpu_s() - cpu_from_s
        count = max(1, self.server.requests(self.model) - from_count)
        for index, outputs in answers:
            self._compare(index, outputs["probabilities"])
        if not answers:
            self.check_over("grpc")
        return Turn(
            load=load,
            cpu_s_per_1000=1000 * used_s / count,
            load_cpu_s_per_1000=1000 * load.load_cpu_s / count,
            ratio_to_limit=load.requests_per_s / limit.tiles_per_s,
            latency_to_limit=load.mean_ms / limit.mean_call_ms,
            cpu_ratio=1000 * used_s / count / limit.cpu_s_per_1000,
        )

    def check_over(self, protocol: str) -> None:
        """Ask for every tile once through Clotline's own client; raises LoadError for an answer that is not LIMIT's."""
        from clients.address import parse_address
        from clients.transport import open_transport

        authority = self.server.http if protocol == "http" else self.server.grpc
        transport = open_transport(parse_address(f"{protocol}://{authority}"))
        try:
            for index, tile in enumerate(self.tiles):
                self._compare(index, transport.infer(self.model, [tile], 60.0).outputs["probabilities"])
        finally:
            transport.close()

    def _compare(self, index: int, got: Any) -> None:
        got_K = np.asarray(got, np.float64).reshape(-1)
        wanted_K = self.expected_NK[index]
        difference = float(np.abs(got_K - wanted_K).max()) if got_K.shape == wanted_K.shape else float("inf")
        if not difference <= TOLERANCE:
            raise LoadError(
                f"tile {index}: the server answers {got_K.tolist()}, the bare loop {wanted_K.tolist()}; they may differ "
                f"by {TOLERANCE}. A figure for wrong answers is worth nothing."
            )
        self.checked += 1
        self.max_abs_diff = max(self.max_abs_diff, difference)


def _rounds(
    bench: _Bench, loop: Loop, protocols: Sequence[str], rounds: int, seconds: float
) -> tuple[list[Sample], dict[str, list[Turn]]]:
    limits: list[Sample] = []
    turns: dict[str, list[Turn]] = {protocol: [] for protocol in protocols}
    loop.run(min(0.5, seconds))
    with tqdm(total=rounds * (1 + len(protocols)), unit="run", desc="bench", leave=False) as progress:
        for number in range(rounds):
            limits.append(loop.run(seconds))
            progress.update()
            # The order of the protocols changes, so that none always follows the loop.
            for protocol in protocols if number % 2 == 0 else list(reversed(protocols)):
                turns[protocol].append(bench.turn(protocol, seconds, limits[-1]))
                progress.update()
    return limits, turns


def summary(limits: Sequence[Sample], turns: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """Medians over the rounds, a protocol each; at the top, of every figure the worse protocol."""
    by_protocol = {protocol: _medians(of_one) for protocol, of_one in turns.items()}
    limit = median_sample(limits)
    rows = list(by_protocol.values())
    worst = {
        name: (min if name in ("ratio_to_limit", "requests_per_s") else max)(row[name] for row in rows)
        for name in rows[0]
    }
    return {
        **worst,
        "limit_per_s": round(limit.tiles_per_s, 2),
        "limit_cpu_s_per_1000": round(limit.cpu_s_per_1000, 3),
        "limit_call_ms": round(limit.mean_call_ms, 3),
        "protocols": by_protocol,
        "limit_rounds": [round(sample.tiles_per_s, 2) for sample in limits],
        "ratio_rounds": {
            p: [round(turn.ratio_to_limit, 4) for turn in of_one] for p, of_one in turns.items()
        },
        "cpu_ratio_rounds": {p: [round(turn.cpu_ratio, 4) for turn in of_one] for p, of_one in turns.items()},
    }


def _medians(turns: Sequence[Turn]) -> dict[str, float]:
    def median(values: list[float], digits: int) -> float:
        return round(statistics.median(values), digits)

    return {
        "ratio_to_limit": median([turn.ratio_to_limit for turn in turns], 4),
        "requests_per_s": median([turn.load.requests_per_s for turn in turns], 2),
        "mean_ms": median([turn.load.mean_ms for turn in turns], 2),
        "p50_ms": median([turn.load.p50_ms for turn in turns], 2),
        "p95_ms": median([turn.load.p95_ms for turn in turns], 2),
        "p95_to_mean": median([turn.load.p95_ms / turn.load.mean_ms for turn in turns], 4),
        "latency_to_limit": median([turn.latency_to_limit for turn in turns], 4),
        "cpu_s_per_1000": median([turn.cpu_s_per_1000 for turn in turns], 3),
        "cpu_ratio": median([turn.cpu_ratio for turn in turns], 4),
        "load_cpu_s_per_1000": median([turn.load_cpu_s_per_1000 for turn in turns], 3),
    }


def layout_of(text: str) -> Layout:
    """The layout that `PxTxB` names; raises PerfInputError."""
    numbers = text.lower().split("x")
    if len(numbers) != 3 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise PerfInputError(f"--layout takes three whole numbers like 2x1x1, not {text!r}.")
    processes, threads, batch = map(int, numbers)
    return Layout(processes, threads, batch, spin=processes == 1)


def _choose_layout(work: ServedWork, files: Sequence[Path], concurrency: int, seconds: float) -> Layout:
    alone = concurrency == 1
    layouts = latency_layouts(cores()) if alone else throughput_layouts(cores())
    if len(layouts) == 1:
        return layouts[0]
    return best(try_layouts(work, layouts, files, min(_LAYOUT_TRIAL_S, seconds), 2), by_latency=alone)


def _expected(work: ServedWork, files: Sequence[Path]) -> NDArray[np.float64]:
    with Loop(work, Layout(1, 1), files) as loop:
        return np.asarray(loop.probabilities, np.float64)


def _tell(layout: Layout, answer: Mapping[str, Any]) -> None:
    print(
        f"LIMIT {answer['limit_per_s']} tiles/s, {answer['limit_cpu_s_per_1000']} CPU s/1000 ({layout})",
        file=sys.stderr,
    )
    for protocol, row in answer["protocols"].items():
        print(
            f"{protocol:6}{row['requests_per_s']} requests/s, {row['ratio_to_limit']} x LIMIT; mean {row['mean_ms']} ms, "
            f"p95 {row['p95_ms']} ms ({row['p95_to_mean']} x mean); {row['cpu_s_per_1000']} CPU s/1000 "
            f"({row['cpu_ratio']} x LIMIT)",
            file=sys.stderr,
        )
