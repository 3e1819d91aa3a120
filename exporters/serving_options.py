"""How exported models are to be served."""

from __future__ import annotations

import dataclasses

from exporters.errors import FormatError
from exporters.triton_config import INSTANCE_KINDS

LARGEST_BATCH = 1024
MOST_INSTANCES = 64


@dataclasses.dataclass(frozen=True)
class ServingOptions:
    """How the exported models are to be served.

    Attributes:
        max_batch: most tiles in one execution, 1 to 1024; the gate proves this size too.
        instances: executions of preprocessing and of the first format's network at the same time, 1 to 64; networks
            of further formats, which are there to be compared with, have one.
        instance_kind: where the network runs, a key of `triton_config.INSTANCE_KINDS`.
        versions_loaded: newest versions of a network that the server loads, 1 or 2. With 2, an ensemble still
            pinned to the version before goes on answering during a release; it costs the memory and the start-up
            time of both. A version before of another shape is never kept loaded.

    Raises:
        FormatError: naming every value that is out of range.
    """

    max_batch: int = 8
    instances: int = 2
    instance_kind: str = "cpu"
    versions_loaded: int = 1

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.max_batch <= LARGEST_BATCH:
            problems.append(f"max_batch must be from 1 to {LARGEST_BATCH}, not {self.max_batch}")
        if not 1 <= self.instances <= MOST_INSTANCES:
            problems.append(f"instances must be from 1 to {MOST_INSTANCES}, not {self.instances}")
        if self.instance_kind not in INSTANCE_KINDS:
            problems.append(
                f"instance_kind must be one of {', '.join(INSTANCE_KINDS)}, not {self.instance_kind!r}"
            )
        if self.versions_loaded not in (1, 2):
            problems.append(f"versions_loaded must be 1 or 2, not {self.versions_loaded}")
        if problems:
            raise FormatError("; ".join(problems))
