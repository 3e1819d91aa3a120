"""What a load generator saw of a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoadFigures:
    """Of one run in a closed loop.

    Attributes:
        requests_per_s: answers a second.
        mean_ms, p50_ms, p95_ms: latency as the client saw it.
        load_cpu_s: CPU seconds that the load generator itself used.
    """

    requests_per_s: float
    mean_ms: float
    p50_ms: float
    p95_ms: float
    load_cpu_s: float
