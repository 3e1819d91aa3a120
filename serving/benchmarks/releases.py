"""python -m serving.benchmarks releases [--releases A B C] [--times 20]

Starts a server on a live directory and keeps `--concurrency` clients asking it, half over HTTP and half over gRPC, while
`python -m serving release` and `python -m serving rollback` move it, `--times` times each, in alternation. Three releases
take turns, so that each `release` brings in one that is not loaded. Every answer is compared with what the release that it
claims (its model_version) answers when nothing moves.

Bars: no failed request, no answer that is not wholly that of the release that it claims, p99 of the requests around the
moment of a switch at most twice that before. `p99_release_ms` is of all requests while `release` runs, loading included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.benchmarks.tiny_release import make_release, tiles
from serving.errors import ServingError, UsageError

MODEL = "tile_classifier"
AROUND_SWITCH_S = 0.25
REST_S = 0.4
LEAST_DIFFERENCE = 1e-3
ANSWER_TOLERANCE = 1e-5
LARGEST_P99_RATIO = 2.0
TINY_BIAS = (-1.0, 0.5, 2.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--releases", nargs=3, type=Path, metavar="DIR",
                        help="three releases with different answers (default: tiny networks, made for this)")  # fmt: skip
    parser.add_argument("--times", type=int, default=20, help="releases, and rollbacks (default %(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="clients at a time (default %(default)s)")
    parser.add_argument(
        "--quiet-s", type=float, default=5.0, help="measured before the first (default %(default)g)"
    )


@dataclass
class Load:
    """Clients that ask for one tile after another, and what came of it."""

    http: str
    grpc: str
    tiles: Sequence[bytes]
    answers: list[tuple[float, float, int, int, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self, concurrency: int) -> None:
        """Start the clients, half of each protocol."""
        for number in range(concurrency):
            thread = threading.Thread(target=self._ask, args=(number,), daemon=True)
            self.threads.append(thread)
            thread.start()

    def end(self) -> None:
        """Stop them and wait."""
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def _ask(self, number: int) -> None:
        if number % 2:
            import tritonclient.http as protocol

            client = protocol.InferenceServerClient(self.http, network_timeout=60)
        else:
            import tritonclient.grpc as protocol

            client = protocol.InferenceServerClient(self.grpc)
        inputs = []
        for tile in self.tiles:
            tensor = protocol.InferInput("tile", [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[tile]], dtype=np.object_))
            inputs.append([tensor])
        for turn in itertools.cycle(range(len(inputs))):
            if self.stop.is_set():
                break
            started = time.monotonic()
            try:
                result = client.infer(MODEL, inputs[turn])
                told = result.get_response()
                version = int(told["model_version"] if number % 2 else told.model_version)
                first = float(result.as_numpy("probabilities")[0, 0])
                self.answers.append((started, time.monotonic(), turn, version, first))
            except Exception as error:  # every failure counts, whatever its kind
                self.failures.append(str(error))
        client.close()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns the figures."""
    if options.times < 1 or options.concurrency < 1:
        raise UsageError("--times and --concurrency must be 1 or more.")
    with tempfile.TemporaryDirectory(prefix="clotline-releases-") as directory:
        where = Path(directory)
        releases = options.releases or [
            make_release(where / f"release{number}", bias=bias, instances=2)
            for number, bias in enumerate(TINY_BIAS)
        ]
        name = f"releases-{where.name[-8:]}"
        asked = tiles(512) if not options.releases else _golden_tiles(releases[0])
        up = serving("up", "--live", where / "live", "--release", releases[0], "--name", name, "--http-port", 0,
                     "--grpc-port", 0, "--metrics-port", 0, "--detach")  # fmt: skip
        try:
            return _measure(name, up, releases, asked, options)
        finally:
            serving("down", "--name", name)


def _golden_tiles(release: Path) -> list[bytes]:
    told = json.loads((release / "golden" / "golden.json").read_text())
    return [(release / "golden" / item["path"]).read_bytes() for item in told["items"][:8]]


def serving(*arguments: object) -> dict[str, Any]:
    """The JSON line of `python -m serving ...`. Raises ServingError with its error."""
    done = subprocess.run(
        [sys.executable, "-m", "serving", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ServingError(done.stderr.strip().rpartition("error: ")[2] or f"serving {arguments[0]} failed.")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def expected_answers(
    name: str, http: str, releases: Sequence[Path], asked: Sequence[bytes]
) -> dict[str, NDArray[np.float64]]:
    """Release id -> what it answers to each tile when nothing moves, float64 [tiles]; the last release serves afterwards.

    Raises ServingError if two of them cannot be told apart.
    """
    import tritonclient.http as triton

    client = triton.InferenceServerClient(http, network_timeout=60)
    found: dict[str, NDArray[np.float64]] = {}
    for release in releases:
        told = serving("release", release, "--name", name)
        rows = []
        for tile in asked:
            tensor = triton.InferInput("tile", [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[tile]], dtype=np.object_))
            rows.append(float(client.infer(MODEL, [tensor]).as_numpy("probabilities")[0, 0]))
        found[told["release_id"]] = np.array(rows)
    client.close()
    for one, other in itertools.combinations(found.values(), 2):
        if np.abs(one - other).min() < LEAST_DIFFERENCE:
            raise ServingError(
                "two of the releases answer a tile alike, so that a mixture could not be seen."
            )
    return found


def _measure(
    name: str,
    up: Mapping[str, Any],
    releases: Sequence[Path],
    asked: Sequence[bytes],
    options: argparse.Namespace,
) -> dict[str, Any]:
    from tqdm import tqdm

    expected = expected_answers(name, up["http"], [*releases, releases[0]], asked)
    home = serving("release", releases[0], "--name", name)
    number_to_id = {home["number"]: home["release_id"]}
    load = Load(up["http"], up["grpc"], asked)
    load.start(options.concurrency)
    moves: list[dict[str, Any]] = []
    try:
        time.sleep(1.0)
        quiet = (time.monotonic(), time.monotonic() + options.quiet_s)
        time.sleep(options.quiet_s)
        for turn in tqdm(range(options.times), desc="release, rollback", unit="pair", leave=False):
            for command in (["release", releases[1 + turn % 2]], ["rollback"]):
                started = time.monotonic()
                told = serving(*command, "--name", name)
                moves.append({**told, "from_s": started, "to_s": time.monotonic()})
                number_to_id[told["number"]] = told["release_id"]
                time.sleep(REST_S)
    finally:
        load.end()
    return figures(load, moves, quiet, number_to_id, expected, options.concurrency)


def figures(
    load: Load,
    moves: Sequence[Mapping[str, Any]],
    quiet: tuple[float, float],
    number_to_id: Mapping[int, str],
    expected: Mapping[str, NDArray[np.float64]],
    concurrency: int,
) -> dict[str, Any]:
    """The figures of a run.

    Args:
        load: ended.
        moves: what the commands printed, with "from_s" and "to_s".
        quiet: from and to, when nothing moved.
        number_to_id: version of the public model -> release.
        expected: release -> its answers.
        concurrency: told again.
    """
    wrong = [
        row
        for row in load.answers
        if row[3] not in number_to_id
        or abs(expected[number_to_id[row[3]]][row[2]] - row[4]) > ANSWER_TOLERANCE
    ]
    table = np.array(
        [(begun, ended, version) for begun, ended, _, version, _ in sorted(load.answers, key=lambda a: a[1])]
    )
    begun, ended, version = table.T
    latency_ms = (ended - begun) * 1e3

    def p99(intervals: Sequence[tuple[float, float]]) -> float:
        chosen = np.zeros(len(begun), bool)
        for low, high in intervals:
            chosen |= (begun <= high) & (ended >= low)
        return round(float(np.percentile(latency_ms[chosen], 99)), 3) if chosen.any() else float("nan")

    switches = []
    for move in moves:
        after = (ended >= move["from_s"]) & (version == move["number"])
        moment = float(ended[after].min()) if after.any() else move["to_s"]
        switches.append((moment - AROUND_SWITCH_S, moment + AROUND_SWITCH_S))
    by_event = {
        event: [(m["from_s"], m["to_s"]) for m in moves if m["event"] == event]
        for event in ("release", "rollback")
    }
    before = p99([quiet])
    values = {
        "requests": len(load.answers) + len(load.failures),
        "failed": len(load.failures),
        "first_failure": load.failures[0] if load.failures else None,
        "mixed": len(wrong),
        "releases": sum(m["event"] == "release" for m in moves),
        "rollbacks": sum(m["event"] == "rollback" for m in moves),
        "concurrency": concurrency,
        "requests_per_s": round(
            float(((ended > quiet[0]) & (ended < quiet[1])).sum() / (quiet[1] - quiet[0])), 1
        ),
        "p99_before_ms": before,
        "p99_switch_ms": p99(switches),
        "p99_release_ms": p99(by_event["release"]),
        "p99_rollback_ms": p99(by_event["rollback"]),
        "slowest_ms": round(float(latency_ms.max()), 3),
        "switch_s": _median(m["switch_s"] for m in moves),
        "release_s": _median(m["total_s"] for m in moves if m["event"] == "release"),
        "rollback_s": _median(m["total_s"] for m in moves if m["event"] == "rollback"),
        "memory_mb": moves[-1]["memory_mb"],
    }
    values["p99_ratio"] = round(values["p99_switch_ms"] / before, 3)
    values["passed"] = not load.failures and not wrong and values["p99_ratio"] <= LARGEST_P99_RATIO
    return {**values, "exit_code": 0 if values["passed"] else 1}


def _median(values: Any) -> float:
    return round(float(np.median(list(values))), 4)
