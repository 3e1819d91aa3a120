"""Load by NVIDIA's perf_analyzer: a C++ program that costs well under a millisecond of CPU time a request over gRPC."""

from __future__ import annotations

import re
import resource
import subprocess
from pathlib import Path

from perf.errors import AnalyzerError
from perf.install import perf_analyzer
from perf.load import LoadFigures

_WINDOWS = 3
"""perf_analyzer answers from three windows that agree; with so wide a tolerance, from the first three."""
_FIGURES = {
    "requests_per_s": r"Throughput: ([\d.]+) infer/sec",
    "mean_us": r"Avg latency: (\d+) usec",
    "p50_us": r"p50 latency: (\d+) usec",
    "p95_us": r"p95 latency: (\d+) usec",
}


def analyzer_load(
    protocol: str, address: str, model: str, input_data: Path, concurrency: int, seconds: float
) -> LoadFigures:
    """A closed loop of `concurrency` requests for about `seconds`.

    Args:
        protocol: ``http`` or ``grpc``.
        address: host:port of that protocol.
        model: the model asked.
        input_data: of `perf.inputs.write_inputs`.
        concurrency: requests in flight.
        seconds: of measurement, in three windows.

    Raises:
        AnalyzerError: perf_analyzer is missing, failed, or said nothing.
    """
    command = [str(perf_analyzer()), "-m", model, "-i", protocol, "-u", address, "--input-data", str(input_data),
               "--concurrency-range", f"{concurrency}:{concurrency}", "--max-threads", str(concurrency),
               "-p", str(max(100, round(1000 * seconds / _WINDOWS))), "-s", "999", "-r", str(_WINDOWS)]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60 + 10 * seconds, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AnalyzerError(f"perf_analyzer did not run: {error}") from error
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = figures_of(done.stdout)
    if done.returncode or not figures:
        said = [
            line.strip()
            for line in (done.stderr + done.stdout).splitlines()
            if "rror" in line or "ailed" in line
        ]
        raise AnalyzerError(f"perf_analyzer failed: {' '.join(said[:3]) or done.stderr.strip()[-300:]}")
    return LoadFigures(
        requests_per_s=figures["requests_per_s"],
        mean_ms=figures["mean_us"] / 1000,
        p50_ms=figures["p50_us"] / 1000,
        p95_ms=figures["p95_us"] / 1000,
        load_cpu_s=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    )


def figures_of(report: str) -> dict[str, float]:
    """The client's figures in what perf_analyzer prints, empty if one is missing."""
    client = report.partition("Client:")[2].partition("Server:")[0]
    found = {name: re.search(pattern, client) for name, pattern in _FIGURES.items()}
    return {name: float(match[1]) for name, match in found.items() if match} if all(found.values()) else {}
