"""Making a live directory ready for a start of tritonserver on it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from serving.embedded import triton_home
from serving.instances import instances
from serving.releases.bundle import read_bundle
from serving.releases.errors import NotLive
from serving.releases.live import Live, caller, live_directory_of
from serving.releases.switching import Order, recover
from serving.releases.switching import release as make_release
from serving.tritonserver import TritonServer


def prepare(
    directory: Path,
    release: Path | None = None,
    *,
    first_number: int = 1,
    tritonserver: TritonServer | None = None,
) -> Path:
    """What a start on a live directory needs; no server but the caller's own, which is down, may be on it.

    Completes or undoes what a killed command left behind. Brings `release` in where the directory is new or empty.

    Args:
        directory: the live directory.
        release: a Release. Where the directory serves a release already, it has to be that one.
        first_number: of the first release of a new directory; others count on.
        tritonserver: that is to be started; None: the one that is found.

    Returns:
        The model repository to serve.

    Raises:
        NotLive: there is no release in it and none was given, it serves another one, or it has a server.
        BadRelease: `release` is none.
        LiveBusy: a release or rollback is under way.
    """
    live = Live(directory.resolve())
    for other in instances(triton_home()):
        if other.launcher_pid != os.getpid() and live_directory_of(other.repository) == live.directory:
            raise NotLive(f"{directory} serves {other.name} already: a live directory belongs to one server.")
    order = Order(by=caller(), reason="start", tritonserver=tritonserver)
    if release is None and live.read().serving is None and live.read().switching is None:
        raise NotLive(
            f"{directory} has no release to serve; bring one in: python -m serving up --live {directory} --release RELEASE"
        )
    bundle = read_bundle(release) if release else None
    with live.hold(order.by):
        state = recover(live, None, order)
        if bundle and state.serving is None:
            if first_number > state.next_number:
                live.write(replace(state, next_number=first_number))
            make_release(live, None, bundle, order)
        elif bundle and state.serving and state.serving.release_id != bundle.release_id:
            raise NotLive(
                f"{directory} serves release {state.serving.release_id}, not {bundle.release_id}: start it without "
                f"--release, then `python -m serving release {release}`."
            )
    return live.models
