"""python -m perf slides --repository releases/bags --tiles-a-slide 16 --concurrency 8,64

Serves `slide_classifier` and measures it against LIMIT (`python -m perf limit`: the same decoding and the same encoder in a
bare loop), turn by turn, in closed loops over HTTP of whole slides. Ratios compare tiles a second within a round; medians
of the rounds are told. Every answer is compared with the first one to the same bag.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import struct
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from perf.bench_server import BenchServer, serving
from perf.errors import LoadError, PerfInputError
from perf.http_load import http_load, infer_answer
from perf.limit import (
    Loop,
    Sample,
    about_tiles,
    add_work_arguments,
    best,
    throughput_layouts,
    try_layouts,
    work_tiles,
    write_tiles,
)
from perf.machine import cores, machine
from perf.served_work import RUNTIMES, ServedWork, config_of, models_of
from slides.decode import jpeg_decoder

BAGS = 8
TOLERANCE = 1e-4
QUIET_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `slides`."""
    add_work_arguments(parser)
    parser.set_defaults(classifier="slide_classifier")
    parser.add_argument("--tiles-a-slide", type=int, default=16, metavar="T", help="default %(default)s")
    parser.add_argument(
        "--concurrency", default="8,64", metavar="LIST", help="slides in flight (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--limit-repository", type=Path, metavar="DIR", help="LIMIT's encoder is in this repository"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`slides`; raises PerfError."""
    numbers = options.concurrency.split(",")
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise PerfInputError(f"--concurrency takes whole numbers like 8,64, not {options.concurrency!r}.")
    if options.rounds < 1 or options.tiles_a_slide < 1:
        raise PerfInputError("--rounds and --tiles-a-slide must be at least 1.")
    limit_repository = models_of(options.limit_repository or options.repository)
    work = _encoder_of(limit_repository, options.classifier, options.limit_decoder)
    tiles = work_tiles(options)
    requests = slide_requests(options.classifier, tiles, options.tiles_a_slide)
    limits: list[Sample] = []
    turns: dict[int, list[dict[str, float]]] = {int(number): [] for number in numbers}
    checked, largest = 0, 0.0
    with tempfile.TemporaryDirectory(prefix="clotline-slides-") as scratch:
        files = write_tiles(scratch, tiles)
        layout = best(try_layouts(work, throughput_layouts(cores()), files, 1.0, 2), by_latency=False)
        with Loop(work, layout, files) as loop, serving(models_of(options.repository)) as server:
            total = options.rounds * (1 + len(turns))
            with tqdm(total=total, unit="run", desc="slides", leave=False) as progress:
                for _ in range(options.rounds):
                    limits.append(loop.run(options.seconds))
                    progress.update()
                    for slides, found in turns.items():
                        figures, answers = _turn(server, requests, slides, options, limits[-1])
                        found.append(figures)
                        checked, largest = checked + len(answers), max(largest, _check(answers))
                        progress.update()
    return {
        "limit_per_s": round(statistics.median(sample.tiles_per_s for sample in limits), 2),
        "limit_cpu_s_per_1000": round(statistics.median(sample.cpu_s_per_1000 for sample in limits), 3),
        "ratio_to_limit": min(_median(found, "ratio_to_limit") for found in turns.values()),
        "ratio_rounds": {
            str(slides): [round(figures["ratio_to_limit"], 4) for figures in found]
            for slides, found in turns.items()
        },
        "answers_checked": checked,
        "max_abs_diff": largest,
        "slides_in_flight": {
            str(slides): {name: _median(found, name) for name in found[0]} for slides, found in turns.items()
        },
        "tiles_a_slide": options.tiles_a_slide,
        "limit_model": work.network,
        "limit_decoder": work.decoder,
        "decoder": jpeg_decoder(),
        "layout": dataclasses.asdict(layout),
        "tiles": about_tiles(tiles),
        "rounds": options.rounds,
        "machine": machine(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def slide_requests(model: str, tiles: Sequence[bytes], tiles_a_slide: int) -> list[bytes]:
    """Whole HTTP requests of different bags, which are the same tiles in different orders."""
    generator = np.random.default_rng(0)
    requests = []
    for _ in range(BAGS):
        bag = [tiles[row % len(tiles)] for row in generator.permutation(tiles_a_slide)]
        body = b"".join(struct.pack("<I", len(tile)) + tile for tile in bag)
        tensor = {"name": "tiles", "datatype": "BYTES", "shape": [len(bag)]}
        wanted = [
            {"name": name, "parameters": {"binary_data": True}} for name in ("probabilities", "attention")
        ]
        header = json.dumps(
            {"inputs": [{**tensor, "parameters": {"binary_data_size": len(body)}}], "outputs": wanted}
        ).encode()
        head = (
            f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: server\r\nContent-Type: application/octet-stream\r\n"
            f"Inference-Header-Content-Length: {len(header)}\r\nContent-Length: {len(header) + len(body)}\r\n\r\n"
        )
        requests.append(b"".join((head.encode(), header, body)))
    return requests


def _turn(
    server: BenchServer, requests: Sequence[bytes], slides: int, options: argparse.Namespace, limit: Sample
) -> tuple[dict[str, float], list[tuple[int, bytes]]]:
    host, _, port = server.http.rpartition(":")
    cpu_from_s, from_count = server.cpu_s(), server.requests(options.classifier)
    load, answers = http_load(host, int(port), requests, slides, options.seconds)
    # Slides whose connection has gone are answered all the same; they must not be counted in the next turn.
    count = _drained(server, options.classifier, from_count, len(answers) + slides)
    used_s = server.cpu_s() - cpu_from_s
    cpu_s_per_1000 = 1000 * used_s / (count * options.tiles_a_slide)
    tiles_per_s = load.requests_per_s * options.tiles_a_slide
    figures = {
        "ratio_to_limit": tiles_per_s / limit.tiles_per_s,
        "requests_per_s": load.requests_per_s,
        "tiles_per_s": tiles_per_s,
        "mean_ms": load.mean_ms,
        "p95_ms": load.p95_ms,
        "cpu_s_per_1000": cpu_s_per_1000,
        "cpu_ratio": cpu_s_per_1000 / limit.cpu_s_per_1000,
    }
    return figures, answers


def _drained(server: BenchServer, model: str, from_count: int, expected: int) -> int:
    """Slides answered since `from_count`, once all that arrived are: one whose connection was closed in the middle never did."""
    count, changed_s = server.requests(model) - from_count, time.monotonic()
    while count < expected and time.monotonic() < changed_s + QUIET_S:
        time.sleep(0.2)
        before, count = count, server.requests(model) - from_count
        if count != before:
            changed_s = time.monotonic()
    return max(1, count)


def _check(answers: Sequence[tuple[int, bytes]]) -> float:
    """The largest difference between answers to the same bag; raises LoadError if it is too large."""
    first: dict[int, Mapping[str, Any]] = {}
    largest = 0.0
    for index, answer in answers:
        found = infer_answer(answer)
        wanted = first.setdefault(index, found)
        apart = max(float(np.abs(found[name] - wanted[name]).max()) for name in wanted)
        largest = max(largest, apart)
        if not apart <= TOLERANCE or abs(float(found["attention"].sum()) - 1) > 1e-3:
            raise LoadError(
                f"bag {index}: answers differ by {apart}. A figure for wrong answers is worth nothing."
            )
    return largest


def _encoder_of(repository: Path, classifier: str, decoder: str) -> ServedWork:
    """What the bare loop has to do: preprocessing and the (first) encoder behind a slide classifier."""
    parameters = config_of(repository, classifier).parameters
    if "embedder_model" not in parameters:
        raise PerfInputError(f"{classifier} in {repository} is no slide classifier of an export.")
    embedder = config_of(repository, parameters["embedder_model"].string_value)
    steps = list(embedder.ensemble_scheduling.step)
    if len(steps) != 2:
        raise PerfInputError(f"{embedder.name} has {len(steps) - 1} encoders; LIMIT knows one network.")
    encoder = config_of(repository, steps[1].model_name)
    if encoder.backend not in RUNTIMES:
        raise PerfInputError(
            f"{encoder.name} runs on {encoder.backend!r}; LIMIT has a loop for {', '.join(RUNTIMES)}."
        )
    version = max(steps[1].model_version, 1)
    return ServedWork(
        classifier=classifier,
        network=encoder.name,
        runtime=encoder.backend,
        path=(repository / encoder.name / str(version) / encoder.default_model_filename).resolve(),
        input=encoder.input[0].name,
        probabilities=encoder.output[0].name,
        input_size_px=int(encoder.input[0].dims[0]),
        decoder=decoder,
    )


def _median(found: Sequence[Mapping[str, float]], name: str) -> float:
    return round(statistics.median(entry[name] for entry in found), 4)
