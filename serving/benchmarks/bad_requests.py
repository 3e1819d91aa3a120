"""python -m serving.benchmarks bad-requests --repository model_repository

Starts a server and asks its tile_classifier, and its slide_classifier where there is one, `--requests` times from several
clients (half HTTP, half gRPC). Five in a hundred requests are bad ones, of every kind (serving/benchmarks/questions.py).
Every good answer is compared with the one before the load; memory of the server's processes and GET /ready are sampled.

Bars: every bad request is refused with 400 or 404, INVALID_ARGUMENT or NOT_FOUND, and told why; every good one is answered
as before (1e-4); no process ends or begins; ready throughout; memory within 5 % of what it was after the first --settle
requests.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import os
import re
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc
import tritonclient.http
from tqdm import tqdm
from tritonclient.grpc import service_pb2_grpc

from serving.benchmarks.kills import serving_up, tiles_for
from serving.benchmarks.questions import BagQuestions, Question, TileQuestions, config_of
from serving.embedded import triton_home
from serving.errors import ServingError, UsageError
from serving.health import ask_ready
from serving.instances import InstanceState, instances
from serving.processes import memory_bytes, processes_of, start_time_ticks
from serving.synthetic import SPEC_PARAMETER
from serving.triton_http import Refused, TritonHttp
from slides.decode import MAX_TILE_BYTES
from slides.spec import ModelSpec

ONE_BAD_IN = 20
SAME = 1e-4
LARGEST_MEMORY_CHANGE = 0.05
SAMPLES = 5
COUNTED_MEMORY = ("Pss_Anon:", "Pss_Shmem:")
"""Anonymous and shared. Pages of files are left out: their share depends on who else on the machine has mapped the same libraries."""
TIMEOUT_S = 60.0
HTTP_REFUSALS = (400, 404)
GRPC_REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
NOT_OURS = re.compile(r"Traceback|\bAt:\n|\.py\b")
TILE_MODEL, SLIDE_MODEL, PREPROCESS_MODEL = "tile_classifier", "slide_classifier", "tile_preprocess"

Answer = dict[str, np.ndarray]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--repository", type=Path, required=True, metavar="DIR", help="with a tile_classifier"
    )
    parser.add_argument("--requests", type=int, default=20_000, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="clients (default %(default)s)"
    )
    parser.add_argument("--settle", type=int, default=2_000, metavar="N",
                        help="requests before memory is looked at (default %(default)s)")  # fmt: skip
    parser.add_argument(
        "--sample-s", type=float, default=1.0, metavar="S", help="between samples (default %(default)g)"
    )


@dataclass(frozen=True)
class Reply:
    """What came back: an answer, or a refusal's status and text."""

    answer: Answer | None
    status: str
    text: str = ""


class HttpClient:
    """One connection; not for several threads."""

    refusals = tuple(map(str, HTTP_REFUSALS))

    def __init__(self, address: str) -> None:
        self._connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)

    def ask(self, question: Question) -> Reply:
        """Raises OSError and http.client.HTTPException for a broken connection."""
        headers = {"Content-Type": "application/octet-stream"}
        if question.header_bytes is not None:
            headers["Inference-Header-Content-Length"] = str(question.header_bytes)
        self._connection.request("POST", question.path, question.body, headers)
        said = self._connection.getresponse()
        body = said.read()
        if said.status != 200:
            return Reply(None, str(said.status), body.decode(errors="replace"))
        length = said.getheader("Inference-Header-Content-Length")
        result = tritonclient.http.InferResult.from_response_body(
            body, header_length=int(length) if length else None
        )
        return Reply({name: result.as_numpy(name) for name in question.outputs}, "200")

    def close(self) -> None:
        """Let it go."""
        self._connection.close()


class GrpcClient:
    """One channel."""

    refusals = tuple(code.name for code in GRPC_REFUSALS)

    def __init__(self, address: str) -> None:
        unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1),
                     ("grpc.use_local_subchannel_pool", 1)]  # fmt: skip
        self._channel = grpc.insecure_channel(address, options=unlimited)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def ask(self, question: Question) -> Reply:
        """An error of the transport is a refusal like any other: its status tells."""
        try:
            result = tritonclient.grpc.InferResult(self._stub.ModelInfer(question.message, timeout=TIMEOUT_S))
        except grpc.RpcError as error:
            return Reply(None, error.code().name, str(error.details()))
        return Reply({name: result.as_numpy(name) for name in question.outputs}, "OK")

    def close(self) -> None:
        """Let it go."""
        self._channel.close()


Client = HttpClient | GrpcClient


@dataclass
class Load:
    """Clients that go through the questions together, and what they saw."""

    addresses: dict[str, str]
    questions: Sequence[Question]
    expected: dict[int, Answer]
    asked: int = 0
    good: int = 0
    refused: dict[str, Counter[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, protocol: str, turns: Any) -> None:
        """One client, until no turn is left."""
        client = client_for(protocol, self.addresses)
        for number in turns:
            question = self.questions[number]
            try:
                reply = client.ask(question)
            except (OSError, http.client.HTTPException) as error:
                client.close()
                client = client_for(protocol, self.addresses)
                reply = Reply(None, "broken connection", repr(error))
            problem = problem_with(question, reply, self.expected.get(number), client.refusals)
            with self.lock:
                self.asked += 1
                self.good += question.good and problem is None
                if not question.good:
                    self.refused.setdefault(question.kind, Counter())[reply.status] += 1
                if problem:
                    self.problems.append(f"{protocol}: {question.kind}: {problem}")
        client.close()


def client_for(protocol: str, addresses: dict[str, str]) -> Client:
    """A client of `http` or `grpc`."""
    return HttpClient(addresses["http"]) if protocol == "http" else GrpcClient(addresses["grpc"])


def problem_with(
    question: Question, reply: Reply, expected: Answer | None, refusals: Sequence[str]
) -> str | None:
    """What is wrong with a reply, None if it is as it should be."""
    said = f"{reply.status} {reply.text[:300]!r}"
    if not question.good:
        if reply.status not in refusals:
            return f"answered {said}, not {' or '.join(refusals)}"
        if NOT_OURS.search(reply.text) or not re.search(question.says, reply.text, re.DOTALL):
            return f"refused with {said}, which does not say {question.says!r} in plain words"
        return None
    if reply.answer is None or expected is None:
        return f"refused with {said}"
    for name, wanted in expected.items():
        got = reply.answer[name]
        if got.shape != wanted.shape or not np.abs(got - wanted).max() <= SAME:
            return f"{name} is {got.tolist()}, before the load it was {wanted.tolist()}"
    return None


def order(good: Sequence[int], bad: Sequence[int], requests: int) -> list[int]:
    """Which question is asked when; the same for the same arguments.

    Of every ONE_BAD_IN questions one, at a random place among them, is bad. Every bad one takes its turn, in another order each
    time: as they are listed, all large ones would come at once.
    """
    rng = np.random.default_rng(5)
    good_turns = itertools.cycle(good)
    bad_turns = (int(number) for _ in itertools.count() for number in rng.permutation(bad))
    found: list[int] = []
    while len(found) < requests:
        block = [next(good_turns) for _ in range(ONE_BAD_IN)]
        block[rng.integers(ONE_BAD_IN)] = next(bad_turns)
        found += block
    return found[:requests]


def questions_for(triton: TritonHttp) -> list[Question]:
    """All that a server's models can be asked."""
    config = config_of(triton, TILE_MODEL)
    spec = ModelSpec.from_json(config["parameters"][SPEC_PARAMETER]["string_value"])
    tiles = tiles_for(spec)
    limits = triton.config(PREPROCESS_MODEL).get("parameters", {})
    most = int(limits.get("max_tile_bytes", {}).get("string_value", MAX_TILE_BYTES))
    of_tiles = TileQuestions(TILE_MODEL, tiles, int(config["max_batch_size"]), most)
    found = [*of_tiles.good(), *of_tiles.bad()]
    try:
        parameters = triton.config(SLIDE_MODEL)["parameters"]
    except Refused:
        return found
    of_bags = BagQuestions(SLIDE_MODEL, tiles, int(parameters["max_tiles"]["string_value"]))
    return [*found, *of_bags.good(), *of_bags.bad()]


class Watch:
    """Samples memory and readiness until the block ends."""

    def __init__(self, state: InstanceState, load: Load, every_s: float) -> None:
        self._state, self._load, self._every_s = state, load, every_s
        self.samples: list[tuple[int, int]] = []  # requests asked so far, bytes
        self.not_ready = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            self.sample()

    def sample(self) -> None:
        """Look once."""
        pids = [self._state.launcher_pid, *processes_of(self._state.instance_id)]
        self.samples.append((self._load.asked, memory_bytes(pids, COUNTED_MEMORY) or 0))
        self.not_ready += ask_ready(self._state.health)[0] != 200


def identities(state: InstanceState) -> set[tuple[int, int | None]]:
    """Pid and start time of the launcher and of all processes of its instance."""
    pids = [state.launcher_pid, *processes_of(state.instance_id)]
    return {(pid, start_time_ticks(pid)) for pid in pids}


def memory_figures(samples: Sequence[tuple[int, int]], settle: int) -> dict[str, float]:
    """Memory from `settle` requests on, MB, and how far it moved from what it was then.

    Compared are medians of SAMPLES neighbouring samples: a large request that is in flight at the moment is no growth.
    """
    after = [size for asked, size in samples if asked >= settle and size]
    if not after:
        raise ServingError(
            "no sample of memory was taken after --settle requests; ask for more, or sample more often."
        )
    steady = [statistics.median(after[at : at + SAMPLES]) for at in range(max(1, len(after) - SAMPLES + 1))]
    return {
        "memory_mb": round(steady[0] / 1e6, 1),
        "memory_least_mb": round(min(steady) / 1e6, 1),
        "memory_most_mb": round(max(steady) / 1e6, 1),
        "memory_peak_mb": round(max(after) / 1e6, 1),
        "memory_change": round(max(abs(size / steady[0] - 1) for size in steady), 4),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns the JSON document."""
    if options.requests < 2 or options.concurrency < 1 or not 0 <= options.settle < options.requests:
        raise UsageError("--requests must be 2 or more and larger than --settle, --concurrency 1 or more.")
    with serving_up(options.repository) as up:
        state = next(state for state in instances(triton_home()) if state.name == up["name"])
        questions = questions_for(TritonHttp(up["http"], ""))
        load = Load(
            {"http": up["http"], "grpc": up["grpc"]}, questions, _answers_before(up["http"], questions)
        )
        good = [number for number, question in enumerate(questions) if question.good]
        bad = [number for number, question in enumerate(questions) if not question.good]
        before = identities(state)
        started_s = time.monotonic()
        with Watch(state, load, options.sample_s) as watch:
            _ask_all(load, order(good, bad, options.requests), options.concurrency)
        took_s = time.monotonic() - started_s
        watch.sample()
        changed = before ^ identities(state)
        restarts = ask_ready(state.health)[1]["restarts"]
    memory = memory_figures(watch.samples, options.settle)
    for line in dict.fromkeys(load.problems):
        print(f"wrong: {line}", file=sys.stderr)
    passed = (
        not load.problems
        and not changed
        and not watch.not_ready
        and not restarts["server"]
        and not restarts["models"]
        and memory["memory_change"] <= LARGEST_MEMORY_CHANGE
    )
    return {
        "bench": "bad-requests",
        "requests": load.asked,
        "concurrency": options.concurrency,
        "bad": sum(sum(statuses.values()) for statuses in load.refused.values()),
        "bad_wrong": sum(": good: " not in line for line in load.problems),
        "good_right": load.good,
        "good_wrong": sum(": good: " in line for line in load.problems),
        "kinds": {kind: dict(statuses) for kind, statuses in sorted(load.refused.items())},
        "first_problem": load.problems[0] if load.problems else None,
        "processes_changed": len(changed),
        "restarts": restarts,
        "not_ready_samples": watch.not_ready,
        **memory,
        "samples": len(watch.samples),
        "requests_per_s": round(load.asked / took_s, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "passed": passed,
        "exit_code": 0 if passed else 1,
    }


def _answers_before(address: str, questions: Sequence[Question]) -> dict[int, Answer]:
    client = HttpClient(address)
    answers: dict[int, Answer] = {}
    try:
        for number, question in enumerate(questions):
            if question.good:
                reply = client.ask(question)
                if reply.answer is None:
                    raise ServingError(f"a good request was refused: {reply.status} {reply.text}")
                answers[number] = reply.answer
    finally:
        client.close()
    return answers


def _ask_all(load: Load, turns: Sequence[int], concurrency: int) -> None:
    with tqdm(turns, desc="bad-requests", unit="request", file=sys.stderr, leave=False) as progress:
        shared = _Shared(iter(progress))
        clients = [threading.Thread(target=load.run, args=(("http", "grpc")[number % 2], shared))
                   for number in range(concurrency)]  # fmt: skip
        for client in clients:
            client.start()
        for client in clients:
            client.join()


class _Shared:
    """An iterator from which several threads take turns."""

    def __init__(self, turns: Any) -> None:
        self._turns, self._lock = turns, threading.Lock()

    def __iter__(self) -> _Shared:
        return self

    def __next__(self) -> int:
        with self._lock:
            return int(next(self._turns))
