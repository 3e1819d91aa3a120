"""python -m serving.benchmarks queue-policies

What bounded queues, time limits and priorities of Triton's dynamic batcher do to a model of 50 ms on two instances:
throughput under more clients than its queue holds, pauses in which nothing is answered, how a refusal looks and how long
it takes, and how long bursts of eight requests take. docs/serving.md draws the conclusion.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from serving.benchmarks.kills import serving_up

POLICIES = {
    "none": "",
    "size": "default_queue_policy { max_queue_size: 8 }",
    "size, delay": "max_queue_delay_microseconds: 2000 default_queue_policy { max_queue_size: 8 }",
    "size, ordering": "preserve_ordering: true default_queue_policy { max_queue_size: 8 }",
    "timeout": "default_queue_policy { timeout_action: REJECT default_timeout_microseconds: 2000000 }",
    "priorities": "priority_levels: 2 default_priority_level: 1",
}
CONFIG = """
backend: "python"
max_batch_size: 2
input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 1 ] }
instance_group { count: 2 kind: KIND_CPU }
dynamic_batching { %s }
"""
MODEL = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        time.sleep(0.05)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", pb_utils.get_input_tensor_by_name(r, "x").as_numpy())])
                for r in requests]
"""
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]})
PAUSE_S = 0.3
REFUSED_PAUSE_S = 0.02
BURST = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--clients", type=int, default=24, help="that ask without a pause (default %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of load (default %(default)s)")
    parser.add_argument("--bursts", type=int, default=40, help="of eight requests (default %(default)s)")
    parser.add_argument("--only", action="append", choices=sorted(POLICIES), help="may be repeated")


def ask(url: str) -> tuple[int, str, float]:
    """Status, body, and seconds of one request."""
    started_s = time.monotonic()
    connection = http.client.HTTPConnection(url, timeout=20)
    try:
        connection.request("POST", "/v2/models/slow/infer", BODY)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), time.monotonic() - started_s
    finally:
        connection.close()


def measure(url: str, clients: int, seconds: float, bursts: int) -> dict[str, Any]:
    """The figures of one policy."""
    until_s = time.monotonic() + seconds
    seen: list[tuple[float, int, str, float]] = []

    def client() -> None:
        while time.monotonic() < until_s:
            status, body, took_s = ask(url)
            seen.append((time.monotonic(), status, body, took_s))
            if status != 200:
                time.sleep(REFUSED_PAUSE_S)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answered_s = sorted(at_s for at_s, status, _, _ in seen if status == 200)
    refused_s = [took_s for _, status, _, took_s in seen if status != 200]
    took_s = []
    with ThreadPoolExecutor(BURST) as pool:
        for _ in range(bursts):
            started_s = time.monotonic()
            list(pool.map(ask, [url] * BURST))
            took_s.append(time.monotonic() - started_s)
    return {
        "answers_per_s": round(len(answered_s) / seconds, 1),
        "pauses": sum(b - a > PAUSE_S for a, b in itertools.pairwise(answered_s)),
        "refused": len(refused_s),
        "refused_as": sorted({f"{status} {body}" for _, status, body, _ in seen if status != 200})[:3],
        "refused_max_ms": round(1000 * max(refused_s, default=0.0), 1),
        "burst_median_ms": round(1000 * statistics.median(took_s)),
        "burst_max_ms": round(1000 * max(took_s)),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure each policy on a server of its own; returns the JSON document."""
    rows = {}
    for name in tqdm(options.only or POLICIES, desc="policies", file=sys.stderr):
        with tempfile.TemporaryDirectory() as directory:
            version = Path(directory, "slow", "1")
            version.mkdir(parents=True)
            (version / "model.py").write_text(MODEL)
            (version.parent / "config.pbtxt").write_text(CONFIG % POLICIES[name])
            with serving_up(Path(directory)) as up:
                rows[name] = measure(up["http"], options.clients, options.seconds, options.bursts)
    return {"bench": "queue-policies", "clients": options.clients, "policies": rows}
