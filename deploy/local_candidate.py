"""What a stack does for its candidate besides running it: the live directory that it serves, and its end without a lost answer."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from deploy.live_directory import bring_in, promise_number
from deploy.local_plan import LocalPlan
from serving.processes import start_time_ticks

DRAIN_S = 30.0


def bring_in_candidate(plan: LocalPlan) -> None:
    """Make the live directory of a candidate, with the number that its release will have in that of the first server.

    Raises serving.releases.errors.BadRelease where the candidate is no release, LiveBusy while another one moves in.
    """
    remove_candidate(plan)
    release = Path(plan.settings.candidate)
    bring_in(plan.candidate_live, release, promise_number(plan.live, release))


def remove_candidate(plan: LocalPlan) -> None:
    """Remove the live directory of a candidate whose server has ended."""
    shutil.rmtree(plan.candidate_live, ignore_errors=True)


def wait_for_end(workers: dict[int, int], say: Callable[[str], None]) -> None:
    """Wait until these workers of a gateway that was reloaded have given their last answers, for DRAIN_S at most.

    Args:
        workers: pid -> start time, in ticks.
        say: told if some are left.
    """
    deadline_s = time.monotonic() + DRAIN_S
    while left := [pid for pid, ticks in workers.items() if start_time_ticks(pid) == ticks]:
        if time.monotonic() > deadline_s:
            say(f"{len(left)} workers of the gateway still answer after {DRAIN_S:.0f} s: not waited for")
            return
        time.sleep(0.05)
