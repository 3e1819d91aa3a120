"""Stand-in for several GPUs: `training/train.py` whose Accelerate shards weights over processes on the CPU.

Accelerate 1.15 allows FSDP on accelerators only, PyTorch's fully_shard works on the CPU as well. Everything but the check in
Accelerate's state is the real thing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType

_original = state.AcceleratorState.__init__


def _with_fsdp(self: Any, *arguments: Any, **options: Any) -> None:
    _original(self, *arguments, **options)
    plugin = options.get("fsdp_plugin")
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    state.AcceleratorState.__init__ = _with_fsdp  # type: ignore[method-assign]
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from training import train

    sys.exit(train.main())
