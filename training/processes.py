"""The processes that train together: how they are set up, and what they tell each other.

Launched with `accelerate launch` or `torchrun`. On a machine without a GPU several processes are started by
`torchrun --nproc_per_node 2 training/train.py ...` or `accelerate launch --multi_gpu --num_processes 2 ...`;
`accelerate launch --cpu --num_processes 2` starts a single one.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import accelerate
import torch
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list

from slides.errors import SlidesError
from training.errors import LaunchError, TrainingError

if TYPE_CHECKING:
    from training.recipe import Recipe

Outcome = TypeVar("Outcome")
LONGEST_WAIT = datetime.timedelta(hours=12)
"""Processes wait so long for each other: the first one may have to cut all tiles."""


def make_accelerator(recipe: Recipe, trackers: Sequence[Any] = ()) -> accelerate.Accelerator:
    """Accelerate, set up for `recipe`; on a CPU, torch gets this process's share of the cores.

    Args:
        trackers: Accelerate's GeneralTrackers that `accelerator.log` writes to.

    Raises:
        LaunchError: more processes were started than found each other, or FSDP was asked for and cannot be had.
    """
    accelerator = accelerate.Accelerator(
        # Asked for in so many words, because Accelerate joins processes without a GPU only then.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=recipe.mixed_precision,
        log_with=list(trackers) or None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    _refuse_loners(accelerator)
    _refuse_other_sharding(accelerator)
    if accelerator.device.type == "cpu":
        if recipe.mixed_precision == "fp16":
            print(
                "warning: there is no fp16 on a CPU, training goes on in FP32; bf16 works here",
                file=sys.stderr,
            )
        # `accelerate launch` sets OMP_NUM_THREADS to 1, which would leave all cores but one idle.
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(max(1, usable_cores() // max(1, processes)))
    return accelerator


def _refuse_loners(accelerator: accelerate.Accelerator) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > accelerator.num_processes:
        raise LaunchError(
            f"{started} processes were started, but they train as {accelerator.num_processes}; start them with "
            "`accelerate launch --multi_gpu --num_processes N` or `torchrun --nproc_per_node N`"
        )
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and accelerator.num_processes == 1:
        # What accelerate's launcher leaves behind when --cpu and --num_processes are given together.
        print(
            "warning: there is one process; `accelerate launch --cpu` starts no more of them, whatever "
            "--num_processes says: leave --cpu out, or use `torchrun --nproc_per_node N`",
            file=sys.stderr,
        )


def _refuse_other_sharding(accelerator: accelerate.Accelerator) -> None:
    """Accelerate says nothing where it does not shard although it was asked to."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    if accelerator.distributed_type != DistributedType.FSDP:
        raise LaunchError(
            f"FSDP was asked for, but Accelerate shards on several GPUs only; this is {accelerator.num_processes} "
            f"process(es) on {accelerator.device.type!r}: leave out --use_fsdp"
        )
    if not accelerator.is_fsdp2:
        raise LaunchError("only FSDP2 is supported: launch with --fsdp_version 2")


def usable_cores() -> int:
    """Cores that this process may use; all of the machine's where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_main_process() -> bool:
    """Whether this process is the one that writes files and talks to the user."""
    return bool(accelerate.PartialState().is_main_process)


def on_main_process(function: Callable[[], Outcome]) -> Outcome:
    """What `function` returns or raises on the main process, on every process; it runs on that one only.

    What it returns must be picklable. Errors other than TrainingError, SlidesError and OSError are not passed on.
    """
    outcome: list[Any] = [None]
    if is_main_process():
        try:
            outcome[0] = function()
        except (TrainingError, SlidesError, OSError) as error:
            outcome[0] = error
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]  # type: ignore[no-any-return]


def all_numbers(
    values: Sequence[float | torch.Tensor], accelerator: accelerate.Accelerator
) -> list[list[float]]:
    """The numbers of every process, on every process; one list a process. Waits for the device."""
    kind = torch.float32 if accelerator.device.type == "mps" else torch.float64
    row_1V = torch.stack([torch.as_tensor(value, dtype=kind, device=accelerator.device) for value in values])[
        None
    ]
    rows_PV: list[list[float]] = accelerator.gather(row_1V).tolist()
    return rows_PV
