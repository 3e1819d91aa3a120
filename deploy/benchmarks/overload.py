"""python -m deploy.benchmarks overload --repository runs/perf/resnet18

Twice the load that fits, through the gateway, in an open loop (Poisson). In turn, --rounds times: the throughput of a closed
loop, 80 % of it, 200 % for --seconds, and the closed loop again, right after. Clients do not come back after a refusal.

Bars: every refusal within 100 ms of its sending; p95 of the accepted requests <= 2 x that at 80 % load; from 2 to 7 s after the
storm's end full throughput (the median of the rounds >= 0.95). What is full moves on a shared machine by more than that from one
minute to the next: it is the mean of the closed loops before and after the round, each of a server that has had no storm, so that
one which stays slow is seen. Exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from deploy.benchmarks.guarded import Target, executions, guarded, tiles_of
from deploy.benchmarks.guarded import add_arguments as add_shared
from deploy.benchmarks.load import Outcome, closed_loop, open_loop, told
from deploy.errors import UsageError
from perf.machine import machine

REFUSAL_BAR_MS = 100.0
P95_BAR = 2.0
RECOVERY_BAR = 0.95
SETTLE_S, FULL_S = 2.0, 5.0
_REFUSED = 503


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `overload`."""
    add_shared(parser)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the storm (default %(default)s)")
    parser.add_argument(
        "--calm-s", type=float, default=20.0, metavar="S", help="at 80 %% (default %(default)s)"
    )
    parser.add_argument("--factor", type=float, default=2.0, help="of the storm (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
    parser.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="of the closed loop (default %(default)s)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`overload`; raises DeployError."""
    if options.seconds < 1 or options.calm_s < 1 or not 1 < options.factor <= 10:
        raise UsageError("--seconds and --calm-s must be 1 or more, --factor above 1 and at most 10.")
    if options.concurrency < 1 or options.rounds < 1:
        raise UsageError("--concurrency and --rounds must be 1 or more.")
    calm: list[Outcome] = []
    storm: list[Outcome] = []
    full: list[float] = []
    after: list[float] = []
    reached = 0.0
    for number in range(options.rounds + 1):
        with guarded(options) as both:
            target = both.guarded
            requests = target.requests(options.model, tiles_of(options))
            full.append(_throughput(target, requests, options.concurrency))
            print(f"server {number + 1}: full {full[-1]:.1f} requests/s", file=sys.stderr)
            if number == options.rounds:  # only asked what is full now
                break
            calm += open_loop(target, requests, 0.8 * full[-1], options.calm_s, seed=2 * number)
            before, rate = executions(both.server), options.factor * full[-1]
            storm += open_loop(target, requests, rate, options.seconds, connections=96, seed=2 * number + 1)
            reached += executions(both.server) - before
            after.append(_throughput(target, requests, options.concurrency))
    return judged(calm, storm, recovered(full, after)) | {
        "full_per_s": [round(each, 2) for each in full],
        "after_per_s": [round(each, 2) for each in after],
        "executions": round(reached),
        "places": int(both.settings.variables()["CLOTLINE_IN_FLIGHT"]),
        "machine": machine(),
    }


def _throughput(target: Target, requests: Sequence[bytes], concurrency: int) -> float:
    figures, _ = closed_loop(target, requests, concurrency, FULL_S, warm_up_s=SETTLE_S)
    return figures.requests_per_s


def recovered(full: Sequence[float], after: Sequence[float]) -> float:
    """Median over the rounds of the throughput after a storm, as a share of what is full around it.

    Args:
        full: requests/s of the fresh server that each round begins with, and of one after the last round.
        after: requests/s right after each round's storm, of the server that had it.
    """
    shares = [2 * each / (before + later) for each, before, later in zip(after, full, full[1:], strict=False)]
    return statistics.median(shares)


def judged(calm: list[Outcome], storm: list[Outcome], recovery: float) -> dict[str, Any]:
    """Figures and verdict."""
    accepted = [o for o in storm if o.status == 200]
    refused = [o for o in storm if o.status == _REFUSED]
    others = [o for o in [*calm, *storm] if o.status not in (200, _REFUSED)]
    calm_p95_ms = _p95_ms([o.latency_s for o in calm if o.status == 200])
    storm_p95_ms = _p95_ms([o.latency_s for o in accepted])
    # From its sending: how late a request was sent is the load generator's own affair, and told beside it.
    refusals_ms = [1000 * (o.latency_s - (o.sent_s - o.due_s)) for o in refused] or [0.0]
    hinted = sum(b"retry-after: " in o.answer.lower() for o in refused)
    passed = (
        bool(accepted)
        and bool(refused)
        and not others
        and hinted == len(refused)
        and max(refusals_ms) <= REFUSAL_BAR_MS
        and storm_p95_ms <= P95_BAR * calm_p95_ms
        and recovery >= RECOVERY_BAR
    )
    return {
        "passed": passed,
        "offered": len(storm),
        "accepted": len(accepted),
        "refused": len(refused),
        "failed": len(others),
        "first_failure": told(others[0]) if others else None,
        "refusal_max_ms": round(max(refusals_ms), 2),
        "refusal_p50_ms": round(statistics.median(refusals_ms), 2),
        "calm_refused": sum(o.status == _REFUSED for o in calm),
        "calm_p95_ms": round(calm_p95_ms, 2),
        "storm_p95_ms": round(storm_p95_ms, 2),
        "p95_ratio": round(storm_p95_ms / calm_p95_ms, 3) if calm_p95_ms else None,
        "sent_late_p95_ms": round(_p95_ms([o.sent_s - o.due_s for o in storm]), 2),
        "recovery": round(recovery, 4),
        "exit_code": 0 if passed else 1,
    }


def _p95_ms(seconds: list[float]) -> float:
    return float(np.percentile([1000 * s for s in seconds], 95)) if seconds else 0.0
