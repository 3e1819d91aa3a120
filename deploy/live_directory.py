"""What a server that is to be started on a live directory serves: what it served, or the Release that it begins with."""

from __future__ import annotations

from pathlib import Path

from serving.releases.bundle import read_bundle
from serving.releases.live import Live, caller, describe
from serving.releases.preparing import prepare


def serves(live: Path) -> str | None:
    """`release_id` of what a live directory serves, None where it is new or empty."""
    serving = describe(live.resolve())["serving"]
    return str(serving["release_id"]) if serving else None


def promise_number(live: Path, release: Path) -> int:
    """The number that a release will have in a live directory, where no other one gets it.

    Raises serving.releases.errors.BadRelease where `release` is none, LiveBusy while a release is under way.
    """
    return Live(live.resolve()).promise(read_bundle(release).release_id, caller())


def bring_in(live: Path, release: Path | None, first_number: int = 1) -> None:
    """Make a live directory ready for a start; `release` goes into one that is new or empty, others keep what they serve.

    `first_number` is that of the first release of a new one.

    Raises serving.releases.errors.NotLive where there is nothing to serve, BadRelease where `release` is none.
    """
    prepare(live, None if serves(live) else release, first_number=first_number)
