"""How many instances of a network serve on a CPU, and how many tiles they gather: chosen from how long its tiles take.

A network that takes as long as the machine has cores for gets them all. One of a millisecond a tile does not: its instances
would take the cores from preprocessing and from each other, and what an execution costs besides the network (two hops
between processes) weighs as much as the network itself. Figures: docs/performance.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from exporters.triton_config import CPU_DYNAMIC_BATCH
from slides.decode import decode_tile, encode_tile
from slides.spec import ModelSpec

SERVER_MS = 1.0
"""CPU time that the server itself takes for a request, whatever the network: measured by `python -m perf bench`."""
BUSIEST = 0.9
"""Of its time, what an instance may be busy at full load."""
FAST_GATHERED = 4
ALONE_PARAMETER = "alone_thread_count"
_DECODES = 5


@dataclass(frozen=True)
class CpuLayout:
    """How a network is served on a CPU.

    Attributes:
        instances: executions at the same time.
        gathered: tiles of different requests that Triton gathers for one execution.
        alone: whether a lone execution takes all cores, where the backend can do that.
    """

    instances: int
    gathered: int
    alone: bool

    def parameters(self, of_format: Mapping[str, str]) -> dict[str, str]:
        """A format's parameters of its backend, without the one that gives a lone execution all cores if it is not to have them."""
        return {name: value for name, value in of_format.items() if self.alone or name != ALONE_PARAMETER}


def cpu_layout(cores: int, network_ms: float | None, preprocess_ms: float) -> CpuLayout:
    """The layout for a machine.

    Args:
        cores: for preprocessing and network together.
        network_ms: of one tile, in one thread; None where it is not known.
        preprocess_ms: of one tile.
    """
    if network_ms is not None:
        share = network_ms / (network_ms + preprocess_ms + SERVER_MS)
        needed = max(1, math.ceil(cores * share / BUSIEST))
        if needed < cores:
            return CpuLayout(needed, FAST_GATHERED, alone=False)
    return CpuLayout(cores, CPU_DYNAMIC_BATCH, alone=True)


def preprocess_ms(spec: ModelSpec) -> float:
    """Time in which this machine decodes and resizes a tile of the kind that clients cut, the least of several."""
    side_px = spec.tile_size_px
    blotches_HWC = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    repeats = -(-side_px // 16)
    tile_HWC = np.kron(blotches_HWC, np.ones((repeats, repeats, 1), np.uint8))[:side_px, :side_px]
    tile = encode_tile(np.ascontiguousarray(tile_HWC), spec.jpeg_quality)
    times_ms = []
    for _ in range(_DECODES):
        started_s = time.perf_counter()
        decode_tile(tile, spec.input_size_px)
        times_ms.append(1000 * (time.perf_counter() - started_s))
    return min(times_ms)
