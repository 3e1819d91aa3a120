"""What `release` and `rollback` are asked on the command line: which server, by whom, how patiently."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from serving.embedded import triton_home
from serving.errors import InstanceError
from serving.instances import InstanceState, instances
from serving.releases.errors import NotLive
from serving.releases.live import Live, caller, live_directory_of

if TYPE_CHECKING:
    from serving.releases.server import Server
    from serving.releases.switching import Order


def add_order_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that `release` and `rollback` share."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--name", metavar="INSTANCE", help="the server (default: the only one on a live directory)"
    )
    which.add_argument(
        "--live", metavar="DIR", type=Path, help="the server on this live directory, if one runs"
    )
    parser.add_argument("--by", metavar="WHO", help="for the journal (default: user@host)")
    parser.add_argument("--reason", metavar="TEXT", default="", help="for the journal")
    parser.add_argument("--timeout-s", metavar="S", type=seconds, default=300.0,
                        help="for one model to load, or to answer (default %(default)g)")  # fmt: skip
    parser.add_argument("--drain-s", metavar="S", type=seconds, default=30.0,
                        help="wait this long for the last answers of the release before (default %(default)g)")  # fmt: skip


def seconds(text: str) -> float:
    """A positive number of seconds, for argparse."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("a number of seconds above 0 is wanted")
    return value


def chosen(name: str | None, directory: Path | None) -> tuple[Live, InstanceState | None]:
    """The live directory that is meant, and the server that runs on it.

    Raises:
        InstanceError: no such server, it is (re)starting, or several and none was named.
        NotLive: the server serves a plain repository.
    """
    on_live = {state.name: (state, live_directory_of(state.repository)) for state in instances(triton_home())}
    if name:
        if name not in on_live:
            raise InstanceError(f"no server named {name} is up; `python -m serving status` lists them.")
        found = [on_live[name]]
        if found[0][1] is None:
            raise NotLive(
                f"server {name} serves the plain repository {found[0][0].repository}, whose models cannot be changed while "
                "they serve. Start a server with `python -m serving up --live DIR --release RELEASE`."
            )
    else:
        wanted = directory.resolve() if directory else None
        found = [(s, live) for s, live in on_live.values() if live and (wanted is None or live == wanted)]
        if not found and wanted:
            return Live(wanted), None
        if not found:
            raise InstanceError(
                "no server runs on a live directory; start one: python -m serving up --live DIR --release RELEASE"
            )
    if len(found) > 1:
        raise InstanceError(
            f"several servers run on live directories: {', '.join(state.name for state, _ in found)}; name one with --name."
        )
    state, live = found[0]
    sharing = [other.name for other, its in on_live.values() if its == live]
    if len(sharing) > 1:
        raise NotLive(f"{live} serves {' and '.join(sharing)}: a live directory belongs to one server.")
    if state.status in ("starting", "restarting"):
        raise InstanceError(f"server {state.name} is {state.status}; wait until it is ready.")
    assert live is not None  # noqa: S101  chosen above
    return Live(live), state


@contextlib.contextmanager
def held(options: argparse.Namespace) -> Iterator[tuple[Live, Server | None, Order]]:
    """The live directory, held; a connection to its server, if one runs; and the order."""
    live, state = chosen(options.name, options.live)
    with opened(live, state, options.by or caller(), options.reason, options.timeout_s, options.drain_s) as (
        server,
        order,
    ):
        yield live, server, order


@contextlib.contextmanager
def opened(
    live: Live, state: InstanceState | None, by: str, reason: str, timeout_s: float, drain_s: float
) -> Iterator[tuple[Server | None, Order]]:
    """As `held`, for a server that was chosen already."""
    from tqdm import tqdm

    from serving.releases.server import Server
    from serving.releases.switching import Order

    with (
        live.hold(by),
        tqdm(total=None, bar_format="{desc}", file=sys.stderr, leave=False, disable=None) as line,
        Server(state, timeout_s=timeout_s) if state else contextlib.nullcontext() as server,
    ):
        yield server, Order(by, reason, drain_s, line.set_description_str)
