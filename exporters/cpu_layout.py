"""How many instances of a network and of preprocessing serve on a CPU, and how many tiles they gather: chosen from how much
there is to compute, and how large the network is.

A network that takes long gets an instance a core, and two tiles at a time. One of a millisecond or two gets as many instances
as it can keep busy beside preprocessing, four tiles at a time, and one thread also when it is alone: what an execution costs
besides the network (hops between processes, threads that wait for one another) would weigh as much as the network itself.
Preprocessing gets the instances that it keeps busy, a single one on few cores: more processes than cores take turns on them,
and find their caches cold.

Times are those of one core of the machine that they were measured on, reckoned from what is to be computed: only their ratios
matter, which are much the same on another one. Measured where a network is exported, they would say how busy that machine was.
Figures: docs/performance.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from exporters.network_work import NetworkWork
from exporters.triton_config import CPU_DYNAMIC_BATCH
from slides.lone_execution import PARAMETER as ALONE_PARAMETER
from slides.spec import ModelSpec

MS_PER_MULTIPLY_ADD = {"fp32": 8e-9, "fp16": 8e-9, "bf16": 4e-9, "int8": 2e-9}
"""By precision: CPUs compute FP16 as FP32."""
MS_PER_LAYER = 0.015
PREPROCESS_MS_PER_PIXEL = 3.4e-6
"""Decoding and resizing, of a pixel of the tile."""
SERVER_MS = 0.5
"""What the server itself takes for a request, whatever the network."""
FAST_MS = 4.5
"""A network that takes less than this for a tile is a fast one."""
STATIC_BYTES = 64_000_000
"""A network of no more than this is compiled for each size of a batch. With known sizes OpenVINO saves 0.4 ms a tile (two
transposes, and planning), for the weights once a size in memory. A larger network also takes longer, so it gains less."""
FAST_GATHERED = 4
STATIC_PARAMETER = "static_batches"
NICENESS_PARAMETER = "niceness"
GIVES_WAY_FROM = 0.1
"""Of a tile's CPU time, what preprocessing takes where the network gives way to it. Below that, the network would only lose its
caches to it."""


@dataclass(frozen=True)
class CpuLayout:
    """How a network is served on a CPU.

    Attributes:
        instances: executions at the same time.
        gathered: tiles of different requests that Triton gathers for one execution.
        alone: whether a lone execution takes all cores, where the backend can do that.
        static: whether each size of a batch is compiled on its own, where the backend can do that.
        gives_way: whether preprocessing has a core before the network.
        preprocess_instances: processes that decode at the same time.
    """

    instances: int
    gathered: int
    alone: bool
    static: bool
    gives_way: bool
    preprocess_instances: int

    def parameters(self, of_format: Mapping[str, str]) -> dict[str, str]:
        """A format's parameters of its backend, without those of what is not to be done."""
        done = {
            ALONE_PARAMETER: self.alone,
            STATIC_PARAMETER: self.static,
            NICENESS_PARAMETER: self.gives_way,
        }
        return {name: value for name, value in of_format.items() if done.get(name, True)}


def cpu_layout(cores: int, network_ms: float | None, preprocess_ms: float, size_bytes: int) -> CpuLayout:
    """The layout for a machine.

    Args:
        cores: for preprocessing and network together.
        network_ms: of one tile, in one thread; None where it is not known, or not on the CPU.
        preprocess_ms: of one tile.
        size_bytes: of the network's files.
    """
    static = size_bytes <= STATIC_BYTES
    if network_ms is None:
        return CpuLayout(
            cores,
            CPU_DYNAMIC_BATCH,
            alone=True,
            static=static,
            gives_way=False,
            preprocess_instances=cores,
        )
    whole_ms = network_ms + preprocess_ms + SERVER_MS

    def busy(own_ms: float) -> int:
        return math.ceil(cores * own_ms / whole_ms)

    fast = network_ms < FAST_MS
    return CpuLayout(
        busy(network_ms) if fast else cores,
        FAST_GATHERED if fast else CPU_DYNAMIC_BATCH,
        alone=not fast,
        static=static,
        gives_way=preprocess_ms / whole_ms >= GIVES_WAY_FROM,
        preprocess_instances=busy(preprocess_ms),
    )


def network_ms_of(work: NetworkWork, precision: str) -> float:
    """Reckoned time of a tile in one thread, in gathered batches.

    Args:
        work: for one tile.
        precision: key of MS_PER_MULTIPLY_ADD.
    """
    return work.multiply_adds * MS_PER_MULTIPLY_ADD[precision] + work.layers * MS_PER_LAYER


def preprocess_ms_of(spec: ModelSpec) -> float:
    """Reckoned time in which a tile of the kind that clients cut is decoded and resized."""
    return spec.tile_size_px**2 * PREPROCESS_MS_PER_PIXEL
