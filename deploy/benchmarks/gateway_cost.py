"""python -m deploy.benchmarks gateway-cost --repository runs/perf/resnet18

What the gateway costs: throughput in a closed loop at --concurrency, and latency of a single client, with and without it, in
turns, over HTTP and gRPC; medians of the rounds. HTTP load comes from one loop for both, gRPC load from perf_analyzer. The
clients' own TLS counts as the gateway's cost, for it takes from the same cores.

Bars: throughput through the gateway >= 0.97 of direct, p50 of a single client <= 1 ms more. Exit code 1 if one is missed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from deploy.benchmarks.guarded import Guarded, Target, guarded, tiles_of
from deploy.benchmarks.guarded import add_arguments as add_shared
from deploy.benchmarks.load import closed_loop
from deploy.errors import DeployError, UsageError
from perf.analyzer import figures_of
from perf.http_load import infer_answer
from perf.inputs import write_inputs
from perf.install import perf_analyzer
from perf.load import LoadFigures
from perf.machine import machine

THROUGHPUT_BAR = 0.97
LATENCY_BAR_MS = 1.0
PROTOCOLS = ("http", "grpc")
_WINDOWS = 3
_TRIES = 3  # perf_analyzer gives up where an answer came in no window
Turn = tuple[str, str, int]
"""Protocol, `direct` or `gateway`, requests in flight."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `gateway-cost`."""
    add_shared(parser)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(default %(default)s)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each turn (default %(default)s)")
    parser.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="requests in flight (default %(default)s)"
    )
    parser.add_argument(
        "--protocols", default="http,grpc", metavar="LIST", help="of http, grpc (default %(default)s)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`gateway-cost`; raises DeployError."""
    protocols = [name.strip() for name in options.protocols.split(",")]
    if (
        options.rounds < 1
        or options.concurrency < 1
        or options.seconds <= 0
        or set(protocols) - set(PROTOCOLS)
    ):
        raise UsageError("--rounds, --concurrency and --seconds must be above 0, --protocols of http, grpc.")
    tiles = tiles_of(options)
    measured: dict[Turn, list[LoadFigures]] = {}
    cpu_s_per_1000: dict[str, list[float]] = {protocol: [] for protocol in protocols}
    with tempfile.TemporaryDirectory() as scratch, guarded(options, statistics=True) as both:
        places = both.settings.variables()["CLOTLINE_IN_FLIGHT"]
        if options.concurrency > int(places):
            raise UsageError(
                f"--concurrency {options.concurrency}: the gateway lets {places} through at once."
            )
        bench = _Bench(both, options.model, tiles, write_inputs(Path(scratch), tiles))
        checked = bench.check()
        turns = [
            (p, way, c) for p in protocols for c in (options.concurrency, 1) for way in ("direct", "gateway")
        ]
        for turn in turns:
            bench.load(turn, min(1.0, options.seconds))
        with tqdm(total=options.rounds * len(turns), desc="gateway-cost", leave=False) as progress:
            for number in range(options.rounds):
                for turn in turns if number % 2 == 0 else list(reversed(turns)):
                    cpu_from_s, from_count = both.cpu_s(), both.server.requests(options.model)
                    measured.setdefault(turn, []).append(bench.load(turn, options.seconds))
                    if turn[1:] == ("gateway", options.concurrency):
                        count = max(1, both.server.requests(options.model) - from_count)
                        cpu_s_per_1000[turn[0]].append(1000 * (both.cpu_s() - cpu_from_s) / count)
                    progress.update()
    rows = {protocol: _row(measured, protocol, options.concurrency) for protocol in protocols}
    passed = all(
        row["throughput_ratio"] >= THROUGHPUT_BAR and row["p50_added_ms"] <= LATENCY_BAR_MS
        for row in rows.values()
    )
    for protocol, row in rows.items():
        print(
            f"{protocol:6}{row['gateway_per_s']} against {row['direct_per_s']} requests/s: {row['throughput_ratio']}; "
            f"p50 of a single client {row['gateway_p50_ms']} against {row['direct_p50_ms']} ms: +{row['p50_added_ms']} ms",
            file=sys.stderr,
        )
    return {
        "passed": passed,
        "throughput_ratio": min(row["throughput_ratio"] for row in rows.values()),
        "p50_added_ms": max(row["p50_added_ms"] for row in rows.values()),
        "gateway_cpu_s_per_1000": {
            p: round(statistics.median(each), 3) for p, each in cpu_s_per_1000.items()
        },
        "protocols": rows,
        "concurrency": options.concurrency,
        "rounds": options.rounds,
        "answers_checked": checked,
        "machine": machine(),
        "exit_code": 0 if passed else 1,
    }


class _Bench:
    def __init__(self, both: Guarded, model: str, tiles: list[bytes], inputs: Path) -> None:
        self._ways = {"direct": both.direct, "gateway": both.guarded}
        self._model, self._inputs = model, inputs
        self._requests = {way: target.requests(model, tiles) for way, target in self._ways.items()}

    def load(self, turn: Turn, seconds: float) -> LoadFigures:
        """One turn."""
        protocol, way, concurrency = turn
        target = self._ways[way]
        if protocol == "http":
            return closed_loop(target, self._requests[way], concurrency, seconds)[0]
        return _analyzer(target, self._model, self._inputs, concurrency, seconds)

    def check(self) -> int:
        """Ask for every tile in both ways; raises DeployError if the answers differ."""
        answers = []
        for way, target in self._ways.items():
            _, outcomes = closed_loop(target, self._requests[way], 1, 2.0)
            by_index = {o.index: infer_answer(o.answer)["probabilities"] for o in outcomes}
            answers.append(by_index)
        both = set(answers[0]) & set(answers[1])
        if not both or any(not np.allclose(answers[0][i], answers[1][i], atol=1e-5) for i in both):
            raise DeployError("the gateway's answers differ from the server's.")
        return len(both)


def _analyzer(target: Target, model: str, inputs: Path, concurrency: int, seconds: float) -> LoadFigures:
    """perf_analyzer over gRPC, with TLS and key where the target has them."""
    address = target.grpc.replace("127.0.0.1", "localhost") if target.ca else target.grpc
    command = [str(perf_analyzer()), "-m", model, "-i", "grpc", "-u", address, "--input-data", str(inputs),
               "--concurrency-range", f"{concurrency}:{concurrency}", "--max-threads", str(concurrency),
               "-p", str(max(100, round(1000 * seconds / _WINDOWS))), "-s", "999", "-r", str(_WINDOWS)]  # fmt: skip
    if target.ca:
        command += ["--ssl-grpc-use-ssl", "--ssl-grpc-root-certifications-file", str(target.ca)]
    if target.key:
        command += ["-H", f"x-api-key:{target.key}"]
    for _ in range(_TRIES):
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=60 + 10 * seconds,
                check=False,
                errors="replace",
            )
        except subprocess.TimeoutExpired as error:
            raise DeployError("perf_analyzer did not end.") from error
        found = figures_of(done.stdout)
        if found and not done.returncode:
            break
    else:
        raise DeployError(f"perf_analyzer failed: {(done.stderr or done.stdout).strip()[-400:]}")
    return LoadFigures(
        found["requests_per_s"], found["mean_us"] / 1000, found["p50_us"] / 1000, found["p95_us"] / 1000, 0.0
    )


def _row(measured: dict[Turn, list[LoadFigures]], protocol: str, concurrency: int) -> dict[str, Any]:
    many = {
        way: [f.requests_per_s for f in measured[protocol, way, concurrency]] for way in ("direct", "gateway")
    }
    single = {way: [f.p50_ms for f in measured[protocol, way, 1]] for way in ("direct", "gateway")}
    # Ratios within a round: what else the machine does changes from round to round.
    ratios = [g / d for g, d in zip(many["gateway"], many["direct"], strict=True)]
    added_ms = [g - d for g, d in zip(single["gateway"], single["direct"], strict=True)]
    median = statistics.median
    return {
        "throughput_ratio": round(median(ratios), 4),
        "p50_added_ms": round(median(added_ms), 3),
        "direct_per_s": round(median(many["direct"]), 2),
        "gateway_per_s": round(median(many["gateway"]), 2),
        "direct_p50_ms": round(median(single["direct"]), 3),
        "gateway_p50_ms": round(median(single["gateway"]), 3),
        "ratio_rounds": [round(ratio, 4) for ratio in ratios],
        "added_ms_rounds": [round(added, 3) for added in added_ms],
    }
