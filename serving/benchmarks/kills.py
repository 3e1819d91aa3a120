"""python -m serving.benchmarks kills --repository model_repository

Starts a server, loads its tile_classifier, and with --slides its slide_classifier too, from several clients (half HTTP,
half gRPC), and kills with SIGKILL, one after the other: a stub of every model, tritonserver, its guardian. After each
kill it waits until GET /ready says 503, and then until it says 200. Every answer that the clients get is compared with
the one given before the first kill.
Bars: not ready within 2 s, ready again within 10 s, no wrong answer.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tqdm import tqdm

from serving.benchmarks.questions import config_of
from serving.embedded import triton_home
from serving.errors import ServingError, UsageError
from serving.health import ask_ready
from serving.instances import instances
from serving.processes import processes_of
from serving.stubs import stubs_of
from serving.synthetic import SPEC_PARAMETER
from serving.triton_http import TritonHttp
from slides.decode import encode_tile
from slides.spec import ModelSpec

NOT_READY_BAR_S, READY_BAR_S = 2.0, 10.0
SAME = 1e-3
POLL_S = 0.01
GIVE_UP_S = 60.0
SETTLE_S = 1.5
REQUEST_TIMEOUT_S = 5.0
TILES = 8
BAG = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--repository", type=Path, required=True, metavar="DIR", help="with a tile_classifier"
    )
    parser.add_argument("--rounds", type=int, default=10, help="kills of each kind (default %(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="clients (default %(default)s)")
    parser.add_argument("--slides", type=int, default=0, metavar="N",
                        help=f"of them, how many ask slide_classifier with {BAG} tiles (default %(default)s)")  # fmt: skip
    parser.add_argument("--only", action="append", metavar="KIND",
                        help="only this kind: tritonserver, guardian, or the name of a model; may be repeated")  # fmt: skip


@contextmanager
def serving_up(repository: Path) -> Iterator[dict[str, Any]]:
    """A server on free ports for as long as the block lasts; yields its JSON line."""
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "serving", "up", "--repository", str(repository), *ports],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert launcher.stdout  # noqa: S101  opened above
        line = launcher.stdout.readline()
        if not line:
            raise ServingError("the server did not start: see its error above.")
        yield json.loads(line)
    finally:
        launcher.send_signal(signal.SIGTERM)
        launcher.wait()


@dataclass
class Load:
    """Clients that ask without a pause, and what they saw."""

    up: dict[str, Any]
    tiles: list[bytes]
    expected: dict[str, list[np.ndarray]] = field(default_factory=dict)
    right: int = 0
    failed: int = 0
    wrong: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def client(self, protocol: str) -> Any:
        """A connection of one client."""
        if protocol == "grpc":
            return tritonclient.grpc.InferenceServerClient(self.up["grpc"])
        limits = {"connection_timeout": REQUEST_TIMEOUT_S, "network_timeout": REQUEST_TIMEOUT_S}
        return tritonclient.http.InferenceServerClient(self.up["http"], **limits)

    def ask(self, client: Any, protocol: str, model: str, number: int) -> np.ndarray:
        """The probabilities of one tile, or of the bag that begins with it."""
        module = tritonclient.grpc if protocol == "grpc" else tritonclient.http
        if model == "slide_classifier":
            name, shape = "tiles", [BAG]
        else:
            name, shape = "tile", [1, 1]
        jpegs = [self.tiles[(number + i) % len(self.tiles)] for i in range(shape[-1])]
        tensor = module.InferInput(name, shape, "BYTES")
        tensor.set_data_from_numpy(np.array(jpegs, dtype=np.object_).reshape(shape))
        timeout = {"client_timeout": REQUEST_TIMEOUT_S} if protocol == "grpc" else {}
        return np.asarray(client.infer(model, [tensor], **timeout).as_numpy("probabilities"))

    def expect(self, models: set[str]) -> None:
        """Ask everything once, for the answers that are right."""
        client = self.client("http")
        for model in models:
            self.expected[model] = [
                self.ask(client, "http", model, number) for number in range(len(self.tiles))
            ]
        client.close()

    def run(self, protocol: str, model: str, number: int) -> None:
        """One client, until `stopping`."""
        client = self.client(protocol)
        while not self.stopping.is_set():
            number = (number + 1) % len(self.tiles)
            expected = self.expected[model][number]
            started_s = time.monotonic()
            try:
                got = self.ask(client, protocol, model, number)
            except Exception:  # whatever a client makes of a server that was killed under it
                self.failed += 1
                client.close()
                time.sleep(0.05)
                client = self.client(protocol)
                continue
            self.latencies_s.append(time.monotonic() - started_s)
            if got.shape == expected.shape and np.abs(got - expected).max() <= SAME:
                self.right += 1
            else:
                self.wrong.append(f"{model}, tile {number}: {got.tolist()} for {expected.tolist()}")
        client.close()


def wait_for(health: str, ready: bool, since_s: float) -> float:
    """Seconds since `since_s` until GET /ready says `ready`; GIVE_UP_S if it never did."""
    while time.monotonic() - since_s < GIVE_UP_S:
        if (ask_ready(health)[0] == 200) == ready:
            return time.monotonic() - since_s
        time.sleep(POLL_S)
    return GIVE_UP_S


def victims(name: str) -> dict[str, int]:
    """A process of each kind: the newest stub of each model, tritonserver, guardian."""
    state = next(state for state in instances(triton_home()) if state.name == name)
    found: dict[str, int] = {}
    for pid in processes_of(state.instance_id):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if words[0].endswith(b"/tritonserver"):
            found["tritonserver"] = pid
        elif any(word.endswith(b"guardian.py") for word in words):
            found["guardian"] = pid
    newest_last = sorted(stubs_of(found["tritonserver"]), key=lambda stub: stub.start_ticks)
    return found | {stub.model: stub.pid for stub in newest_last}


def tiles_for(spec: ModelSpec) -> list[bytes]:
    """Different tiles of blotches, always the same ones."""
    rng = np.random.default_rng(8)
    side = spec.tile_size_px
    blotches_NHWC = rng.integers(0, 256, (TILES, 16, 16, 3), dtype=np.uint8)
    fitted = [
        np.kron(b, np.ones((-(-side // 16),) * 2 + (1,), np.uint8))[:side, :side] for b in blotches_NHWC
    ]
    return [encode_tile(np.ascontiguousarray(tile_HWC), spec.jpeg_quality) for tile_HWC in fitted]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns the JSON document."""
    if options.rounds < 1 or options.concurrency < 1 or not 0 <= options.slides <= options.concurrency:
        raise UsageError(
            "--rounds and --concurrency must be 1 or more, --slides 0 or more and at most --concurrency."
        )
    with serving_up(options.repository) as up:
        triton = TritonHttp(up["http"], "")
        config = config_of(triton, "tile_classifier")
        if options.slides:
            config_of(triton, "slide_classifier")
        spec = ModelSpec.from_json(config["parameters"][SPEC_PARAMETER]["string_value"])
        kinds = _kinds(sorted(victims(up["name"])), options.only)
        load = Load(up, tiles_for(spec))
        models = ["slide_classifier"] * options.slides
        models += ["tile_classifier"] * (options.concurrency - options.slides)
        load.expect(set(models))
        protocols = ["http", "grpc"] * (options.concurrency // 2 + 1)
        clients = [threading.Thread(target=load.run, args=(protocols[number], model, number))
                   for number, model in enumerate(models)]  # fmt: skip
        for thread in clients:
            thread.start()
        try:
            rows = _kill_all(up, kinds, options.rounds)
            status = ask_ready(up["health"])[1]
        finally:
            load.stopping.set()
            for thread in clients:
                thread.join()
    kept = all(
        row["not_ready_s"]["max"] <= NOT_READY_BAR_S and row["ready_again_s"]["max"] <= READY_BAR_S
        for row in rows.values()
    )
    kept = kept and not load.wrong
    for line in load.wrong[:5]:
        print(f"wrong: {line}", file=sys.stderr)
    latencies_ms = sorted(1000 * latency_s for latency_s in load.latencies_s)
    return {
        "bench": "kills",
        "rounds": options.rounds,
        "concurrency": options.concurrency,
        "slides": options.slides,
        "kinds": rows,
        "answers_right": load.right,
        "answers_wrong": len(load.wrong),
        "requests_failed": load.failed,
        "p50_ms": round(statistics.median(latencies_ms), 1),
        "p95_ms": round(latencies_ms[int(0.95 * len(latencies_ms))], 1),
        "restarts": status["restarts"],
        "not_ready_max_s": max(row["not_ready_s"]["max"] for row in rows.values()),
        "ready_again_max_s": max(row["ready_again_s"]["max"] for row in rows.values()),
        "passed": kept,
        "exit_code": 0 if kept else 1,
    }


def _kinds(found: list[str], only: list[str] | None) -> list[str]:
    """What is to be killed of what was found."""
    unknown = sorted(set(only or ()) - set(found))
    if unknown:
        raise UsageError(f"--only {', '.join(unknown)}: this server's kinds are {', '.join(found)}.")
    return sorted(set(only or found))


def _kill_all(up: dict[str, Any], kinds: list[str], rounds: int) -> dict[str, Any]:
    seen: dict[str, tuple[list[float], list[float]]] = {kind: ([], []) for kind in kinds}
    with tqdm(total=len(kinds) * rounds, desc="kills", file=sys.stderr) as progress:
        for _ in range(rounds):
            for kind in kinds:
                time.sleep(SETTLE_S)
                wait_for(up["health"], True, time.monotonic())
                pid = victims(up["name"])[kind]
                killed_s = time.monotonic()
                os.kill(pid, signal.SIGKILL)
                not_ready_s = wait_for(up["health"], False, killed_s)
                ready_s = wait_for(up["health"], True, killed_s)
                seen[kind][0].append(not_ready_s)
                seen[kind][1].append(ready_s)
                progress.set_postfix_str(f"{kind}: {not_ready_s:.2f} s, {ready_s:.1f} s")
                progress.update()
    return {kind: {"kills": rounds, "not_ready_s": _span(down), "ready_again_s": _span(again)}
            for kind, (down, again) in seen.items()}  # fmt: skip


def _span(values_s: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values_s), 3), "max": round(max(values_s), 3)}
