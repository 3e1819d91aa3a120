"""python -m deploy.benchmarks attacks --repository runs/perf/resnet18

Bad requests beside good ones: without a key, with a wrong and a revoked one, over the limit, too large, forbidden and hidden
paths, requests of two meanings, slow ones; from a process of their own, over connections of their own, at the lowest priority:
attackers compute elsewhere, and here their own TLS would take from the cores that are measured. Good traffic asks in an
open loop at half of the throughput, in turns alone and attacked; the gateway has 64 places, so that none of it is refused.

Bars: every bad request is refused with its status; none of them reaches Triton; p95 of the good ones under attack <= 1.2 x
that alone (medians of the turns), none of them failed. Exit code 1 if one is missed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from deploy.benchmarks.guarded import Target, guarded, log_of, tiles_of
from deploy.benchmarks.guarded import add_arguments as add_shared
from deploy.benchmarks.load import Connection, closed_loop, open_loop
from deploy.errors import UsageError
from deploy.gateway import reload
from deploy.keys import Limits
from perf.machine import machine

P95_BAR = 1.2
LOWEST_PRIORITY = 19
_SLOW = 16
_CLOSED = 0


@dataclass(frozen=True)
class Attack:
    """One kind of bad request. `statuses`: that it may be refused with; 0 is a closed connection."""

    name: str
    request: bytes
    statuses: tuple[int, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `attacks`."""
    add_shared(parser)
    parser.add_argument(
        "--count", type=int, default=10_050, metavar="N", help="bad requests (default %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="alone and attacked (default %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each turn (default %(default)s)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`attacks`; raises DeployError."""
    if options.count < 1 or options.rounds < 1 or options.seconds < 1:
        raise UsageError("--count, --rounds and --seconds must be 1 or more.")
    a_turn = -(-options.count // options.rounds)
    quiet_ms: list[float] = []
    attacked_ms: list[float] = []
    failed = 0
    refused: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    spawn = multiprocessing.get_context("spawn")
    with (
        guarded(options, client_timeout_s=2, in_flight=64) as both,
        ProcessPoolExecutor(1, mp_context=spawn, initializer=os.nice, initargs=(LOWEST_PRIORITY,)) as other,
    ):
        target = both.guarded
        requests = target.requests(options.model, tiles_of(options))
        revoked = both.for_client(Limits(), "revoked").key or ""
        both.keys.revoke("revoked")
        slow = both.for_client(Limits(rate_per_s=0.1, burst=1), "slow").key or ""
        reload(both.conf)
        bad = attacks(target.key or "", revoked, slow, options.model, both.settings.body_limit_bytes)
        full, _ = closed_loop(target, requests, 8, 3.0)
        rate = full.requests_per_s / 2
        other.submit(attack, target, bad, 1, 1.0).result()
        seen = len(log_of(both))
        answered = 0
        for number in tqdm(range(2 * options.rounds), desc="attacks", leave=False):
            attacked = number % 2 == 1
            storm = other.submit(attack, target, bad, a_turn, options.seconds) if attacked else None
            outcomes = open_loop(target, requests, rate, options.seconds, connections=32, seed=number // 2)
            good = [o for o in outcomes if o.status == 200]
            failed += len(outcomes) - len(good)
            answered += len(good)
            p95_ms = float(np.percentile([1000 * o.latency_s for o in good], 95))
            (attacked_ms if attacked else quiet_ms).append(p95_ms)
            if storm:
                found, strange = storm.result()
                refused += found
                wrong += strange
        # What reached Triton, by the gateway's log: its own count has the supervisor's questions in it.
        reached = Counter(line["route"] for line in log_of(both)[seen:] if line["upstream_status"])
    ratio = statistics.median(attacked_ms) / statistics.median(quiet_ms)
    # "over the limit" is let through as often as its rate allows.
    allowed = refused.pop("over the limit, within it", 0)
    untouched = reached["infer"] == answered and reached.total() - answered <= allowed
    passed = not wrong and not failed and ratio <= P95_BAR and untouched
    print(f"p95 {quiet_ms} ms alone, {attacked_ms} ms attacked", file=sys.stderr)
    return {
        "passed": passed,
        "p95_ratio": round(ratio, 3),
        "p95_alone_ms": round(statistics.median(quiet_ms), 2),
        "p95_attacked_ms": round(statistics.median(attacked_ms), 2),
        "bad_requests": sum(refused.values()),
        "refused": dict(refused),
        "not_refused": dict(wrong),
        "good_answered": answered,
        "good_failed": failed,
        "reached_triton": dict(reached),
        "good_per_s": round(rate, 1),
        "machine": machine(),
        "exit_code": 0 if passed else 1,
    }


def attacks(key: str, revoked: str, slow: str, model: str, body_limit_bytes: int) -> list[Attack]:
    """All kinds but the slow ones."""
    infer = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: localhost\r\n"
    with_key = f"{infer}X-API-Key: {key}\r\n"

    def get(path: str, used: str = key) -> bytes:
        return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {used}\r\n\r\n".encode()

    body = "Content-Length: 1000\r\n\r\n" + 1000 * "x"
    hidden = f"GET /v2/repository/index HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {key}\r\n\r\n"
    return [
        Attack("no key", f"{infer}{body}".encode(), (401,)),
        Attack("wrong key", f"{infer}X-API-Key: clk_{64 * '0'}\r\n{body}".encode(), (401,)),
        Attack("revoked key", f"{infer}X-API-Key: {revoked}\r\n{body}".encode(), (401,)),
        Attack("over the limit", get("/v2", slow), (429,)),
        Attack("too large", f"{with_key}Content-Length: {body_limit_bytes + 1}\r\n\r\n".encode(), (413,)),
        Attack("forbidden path", get("/v2/repository/index"), (403,)),
        Attack("metrics", get("/metrics"), (404,)),
        Attack("traversal", get("/v2/models/x/../../repository/index"), (403,)),
        Attack("encoded traversal", get("/v2/models/%2e%2e/%2e%2e/repository/index"), (403, 404)),
        Attack(
            "two lengths", f"{with_key}Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!".encode(), (400,)
        ),
        Attack(
            "length and chunks",
            f"{with_key}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{hidden}".encode(),
            (400,),
        ),
        Attack(
            "unknown coding", f"{with_key}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n".encode(), (400, 501)
        ),
        Attack("long head", f"{with_key}X-Long: {40_000 * 'a'}\r\n\r\n".encode(), (400,)),
        Attack("no HTTP", b"\x16\x03\x01 hello\r\n\r\n", (400,)),
    ]


def attack(
    target: Target, bad: list[Attack], count: int, seconds: float
) -> tuple[Counter[str], Counter[str]]:
    """`count` bad requests, evenly over `seconds`; what was refused as it should be, and what was not, by name.

    One of fifty is slow: it sends the half of a head and waits to be closed; sixteen of them at a time.
    """
    refused: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    connection = Connection(target)
    waiting: list[tuple[float, Connection]] = []
    started_s = time.perf_counter()
    for number in range(count):
        time.sleep(max(0.0, started_s + seconds * number / count - time.perf_counter()))
        if number % 50 == 49 and len(waiting) < _SLOW:
            slow = Connection(replace(target, key=None))
            slow.begin(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nX-a: ")
            waiting.append((time.perf_counter(), slow))
        else:
            each = bad[number % len(bad)]
            try:
                status, _, _ = connection.ask(each.request)
            except OSError:
                status = _CLOSED
                connection.close()
            if each.name == "over the limit" and status == 200:
                refused["over the limit, within it"] += 1
            elif status in each.statuses:
                refused[each.name] += 1
            else:
                wrong[f"{each.name}: {status}"] += 1
        while waiting and time.perf_counter() - waiting[0][0] > 3.0:
            _end(waiting.pop(0)[1], refused, wrong)
    for _, slow in waiting:
        _end(slow, refused, wrong)
    connection.close()
    return refused, wrong


def _end(slow: Connection, refused: Counter[str], wrong: Counter[str]) -> None:
    """The gateway has to have given a slow request up by now, or to do so soon."""
    try:
        refused["slow"] += 1 if slow.wait(20.0) in (b"", b"408") else 0
    except OSError as error:
        if isinstance(error, TimeoutError):
            wrong["slow: still open"] += 1
        else:
            refused["slow"] += 1
    slow.close()
