"""python -m deploy.benchmarks canary --releases A B

Brings a whole stack up on release A and keeps clients asking it, half over HTTP and half over gRPC, while `python -m deploy
canary` starts B as a candidate, raises its share, and promotes it. Every answer is compared with what the release that it
claims (its model_version) answers when it is asked by name, and the candidate's share with the one that was set.

Bars: no failed request, no answer that is not that of the release that it claims, a share within four standard deviations of
a draw. An HTTP/1.1 connection that nginx closes between two requests, as any server may, is made anew (`sent_again`). Latencies
are told by phase: what a second server costs on the same processors, and what the switches do.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploy.benchmarks.guarded import Target
from deploy.benchmarks.load import Connection
from deploy.errors import DeployError, UsageError
from deploy.gateway import default_places
from deploy.local_settings import PORT_NAMES
from perf.http_load import infer_request
from perf.tiles import benchmark_tiles
from serving.benchmarks.tiny_release import make_release
from serving.embedded import CHECKOUT

MODEL = "tile_classifier"
OUTPUTS = ("probabilities",)
TINY_BIAS = (-1.0, 2.0)
TOLERANCE = 1e-4
DEVIATIONS = 4.0
SHARES_PERCENT = (10.0, 50.0)


@dataclass(frozen=True)
class Answered:
    """One answer: when it was asked for, how long it took, which tile, and what the model said."""

    asked_s: float
    took_s: float
    tile: int
    version: int
    first: float


@dataclass
class Load:
    """Clients that ask for one tile after another until `stop`, and what came of it."""

    target: Target
    tiles: list[bytes]
    answers: list[Answered] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    sent_again: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def work(self, number: int) -> None:
        """One client; those with an even number use gRPC."""
        with self.client(number % 2 == 0) as ask:
            for tile in itertools.cycle(range(len(self.tiles))):
                if self.stop.is_set():
                    return
                started_s = time.monotonic()
                try:
                    version, first = ask(tile, "")
                    took_s = time.monotonic() - started_s
                    self.answers.append(Answered(started_s, took_s, tile, version, first))
                except Exception as error:  # every failure counts, whatever its kind
                    self.failures.append(repr(error))

    @contextmanager
    def client(self, over_grpc: bool) -> Iterator[Callable[[int, str], tuple[int, float]]]:
        """A function of a tile's number and a track ("" for none) that returns model_version and the first probability."""
        with self._grpc() if over_grpc else self._http() as ask:
            yield ask

    @contextmanager
    def _http(self) -> Iterator[Callable[[int, str], tuple[int, float]]]:
        connection = Connection(self.target)

        def ask(tile: int, track: str) -> tuple[int, float]:
            request = self.target.with_key(infer_request(MODEL, self.tiles[tile], OUTPUTS, "localhost"))
            if track:
                first, _, rest = request.partition(b"\r\n")
                request = b"%b\r\nclotline-track: %b\r\n%b" % (first, track.encode(), rest)
            status, answer, again = connection.ask(request)
            self.sent_again += again
            head, _, body = answer.partition(b"\r\n\r\n")
            if status != 200:
                raise DeployError(f"HTTP {status}: {body[-200:].decode(errors='replace')}")
            length = int(head.lower().partition(b"inference-header-content-length: ")[2].split(b"\r\n")[0])
            told = json.loads(body[:length])
            return int(told["model_version"]), float(np.frombuffer(body[length:], np.float32)[0])

        yield ask
        connection.close()

    @contextmanager
    def _grpc(self) -> Iterator[Callable[[int, str], tuple[int, float]]]:
        import tritonclient.grpc as triton

        client = triton.InferenceServerClient(
            self.target.grpc, ssl=True, root_certificates=str(self.target.ca),
            channel_args=[("grpc.use_local_subchannel_pool", 1)],
        )  # fmt: skip
        tensors = []
        for tile in self.tiles:
            tensors.append(triton.InferInput("tile", [1, 1], "BYTES"))
            tensors[-1].set_data_from_numpy(np.array([[tile]], dtype=object))
        wanted = [triton.InferRequestedOutput(name) for name in OUTPUTS]

        def ask(tile: int, track: str) -> tuple[int, float]:
            headers = {"x-api-key": self.target.key, **({"clotline-track": track} if track else {})}
            found = client.infer(MODEL, [tensors[tile]], outputs=wanted, headers=headers, client_timeout=60)
            return int(found.get_response().model_version), float(found.as_numpy("probabilities").flat[0])

        yield ask
        client.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `canary`."""
    parser.add_argument(
        "--releases", nargs=2, type=Path, metavar="DIR",
        help="what serves and the candidate, with different answers (default: tiny networks, made for this)",
    )  # fmt: skip
    parser.add_argument(
        "--clients", type=int, default=default_places() - 2, metavar="N",
        help="at a time (default %(default)s, two less than the gateway lets through)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=15.0, metavar="S", help="of each phase (default %(default)g)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`canary`; raises DeployError."""
    if not 2 <= options.clients < default_places() or options.seconds <= 0:
        raise UsageError(f"--clients must be from 2 to {default_places() - 1}, --seconds more than 0.")
    with tempfile.TemporaryDirectory(prefix="clotline-canary-") as directory:
        state = Path(directory) / "state"
        releases = [path.resolve() for path in options.releases or ()] or [
            make_release(Path(directory) / f"release{number}", bias=bias, instances=2)
            for number, bias in enumerate(TINY_BIAS)
        ]
        ports = [word for name in PORT_NAMES for word in (f"--{name.replace('_', '-')}-port", "0")]
        up = deploy("up", "--state", state, "--release", releases[0], *ports)
        try:
            key = Path(up["key_file"]).read_text().strip()
            address = up["url"].removeprefix("https://")
            port = int(address.rpartition(":")[2])
            target = Target("127.0.0.1", port, address, Path(up["ca"]), key)
            load = Load(target, benchmark_tiles(16, 512))
            return judged(*_measure(load, state, releases[1], options))
        finally:
            deploy("down", "--state", state)


def deploy(*arguments: object) -> dict[str, Any]:
    """The JSON line of `python -m deploy ...`. Raises DeployError with its error."""
    done = subprocess.run(
        [sys.executable, "-m", "deploy", *map(str, arguments)],
        cwd=CHECKOUT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise DeployError(done.stderr.strip().rpartition("error: ")[2] or f"deploy {arguments[0]} failed.")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _measure(
    load: Load, state: Path, candidate: Path, options: argparse.Namespace
) -> tuple[Load, dict[str, tuple[float, float]], dict[int, list[float]], tuple[int, int]]:
    """The load, begin and end of each phase, each release's answers by tile, and the numbers of both releases."""
    threads = [
        threading.Thread(target=load.work, args=(number,), daemon=True) for number in range(options.clients)
    ]
    phases: dict[str, tuple[float, float]] = {}

    def phase(name: str, does: Callable[[], Any]) -> Any:
        print(f"canary: {name}", file=sys.stderr, flush=True)
        started_s = time.monotonic()
        told = does()
        phases[name] = (started_s, time.monotonic())
        return told

    for thread in threads:
        thread.start()
    try:
        phase("before", lambda: time.sleep(options.seconds))
        first, *others = SHARES_PERCENT
        start = ("canary", "start", candidate, "--state", state, "--share", first)
        told = phase("start", lambda: deploy(*start))
        phase(f"{first:g}%", lambda: time.sleep(options.seconds))
        for percent in others:
            change = ("canary", "share", "--state", state, "--share", percent)
            phase(f"to {percent:g}%", functools.partial(deploy, *change))
            phase(f"{percent:g}%", lambda: time.sleep(options.seconds))
        numbers = (told["serving"]["number"], told["candidate"]["number"])
        expected: dict[int, list[float]] = {}
        with load.client(over_grpc=False) as ask:
            for number, track in zip(numbers, ("stable", "canary"), strict=True):
                found = [ask(tile, track) for tile in range(len(load.tiles))]
                if {version for version, _ in found} != {number}:
                    raise DeployError(f"the track {track} is not answered by release {number}: {found}.")
                expected[number] = [first for _, first in found]
        phase("promote", lambda: deploy("canary", "promote", "--state", state))
        phase("after", lambda: time.sleep(options.seconds))
    finally:
        load.stop.set()
        for thread in threads:
            thread.join()
    return load, phases, expected, numbers


def judged(
    load: Load,
    phases: dict[str, tuple[float, float]],
    expected: dict[int, list[float]],
    numbers: tuple[int, int],
) -> dict[str, Any]:
    """The figures, and whether the bars are met."""
    stable, candidate = numbers
    mixed = sum(
        answer.version not in expected
        or abs(answer.first - expected[answer.version][answer.tile]) > TOLERANCE
        for answer in load.answers
    )
    rows, shares_met = {}, True
    for name, (begin_s, end_s) in phases.items():
        of_phase = [answer for answer in load.answers if begin_s <= answer.asked_s < end_s]
        took_ms = 1000 * np.array([answer.took_s for answer in of_phase] or [math.nan])
        share = sum(answer.version == candidate for answer in of_phase) / max(1, len(of_phase))
        rows[name] = {
            "requests": len(of_phase),
            "seconds": round(end_s - begin_s, 2),
            "candidate_share": round(share, 4),
            "p50_ms": round(float(np.percentile(took_ms, 50)), 1),
            "p99_ms": round(float(np.percentile(took_ms, 99)), 1),
        }
        if name.endswith("%") and not name.startswith("to "):
            asked = float(name.removesuffix("%")) / 100
            allowed = DEVIATIONS * math.sqrt(asked * (1 - asked) / max(1, len(of_phase)))
            shares_met = shares_met and abs(share - asked) <= allowed
    gap = max(abs(a - b) for a, b in zip(expected[stable], expected[candidate], strict=True))
    whole = rows["before"]["candidate_share"] == 0 and rows["after"]["candidate_share"] == 1
    passed = not load.failures and not mixed and shares_met and whole and gap > TOLERANCE
    return {
        "passed": passed,
        "requests": len(load.answers),
        "failed": len(load.failures),
        "mixed": mixed,
        "sent_again": load.sent_again,
        "shares_met": shares_met,
        "phases": rows,
        "largest_gap_between_releases": round(gap, 4),
        "first_failures": load.failures[:5],
        "exit_code": 0 if passed else 1,
    }
