"""python -m deploy canary start RELEASE --share 10%
python -m deploy canary start RELEASE --shadow 5%
python -m deploy canary status
python -m deploy canary share --share 50%
python -m deploy canary promote
python -m deploy canary stop

Tries a release on the clients of a stack that is up, before it serves all of them. A second tritonserver serves it; the gateway
lets it answer a share of the inference requests (--share), asks the first server where it fails, and has a share of the requests
answered by both, for comparison alone (--shadow). `promote` moves the first server to the release and ends the second one,
`stop` ends it without that; no request fails meanwhile. docs/gateway.md tells which request goes where.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploy import canary
from deploy.commands.state import add_state, state_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `canary`."""
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    start = actions.add_parser("start", help="serve a candidate beside what serves")
    start.add_argument(
        "release", type=Path, metavar="RELEASE", help="as `python -m serving release` takes it"
    )
    change = actions.add_parser("share", help="change how much a candidate gets")
    for action in (start, change):
        action.add_argument(
            "--share", type=percent, metavar="P%", help="of the inference requests, that it answers"
        )
        action.add_argument(
            "--shadow", type=percent, metavar="P%", help="of them, that both answer for comparison"
        )
    for action in (
        start,
        change,
        actions.add_parser("status", help="what each of the two answered, and how the answers differ"),
        actions.add_parser("promote", help="make the candidate what serves"),
        actions.add_parser("stop", help="end it"),
    ):
        add_state(action)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`canary`; raises DeployError."""
    state = state_of(options)
    if options.action == "start":
        told = canary.start(state, options.release.resolve(), options.share or 0.0, options.shadow or 0.0)
    elif options.action == "share":
        told = canary.share(state, options.share, options.shadow)
    else:
        told = {"status": canary.report, "promote": canary.promote, "stop": canary.stop}[options.action](
            state
        )
    for line in table(told):
        print(line)
    return told


def table(told: dict[str, Any]) -> list[str]:
    """Who gets what, the tracks, a line each, and the comparison."""
    if not told["candidate"]:
        return ["there is no candidate"]
    serving, candidate = told["serving"], told["candidate"]
    lines = [
        f"release {serving['number']} ({serving['release_id']}) serves; release {candidate['number']} ({candidate['release_id']}) "
        f"answers {candidate['canary_percent']:g} % of the requests, and {candidate['shadow_percent']:g} % are compared",
    ]
    lines += [f"{'track':17}{'requests':>10}{'errors':>8}{'mean, ms':>10}"]
    for track, counts in told["tracks"].items():
        mean = "" if counts["mean_ms"] is None else f"{counts['mean_ms']:.1f}"
        lines.append(f"{track:17}{counts['requests']:>10}{counts['errors']:>8}{mean:>10}")
    compared = told.get("shadow", {})
    return [*lines, *(f"compared: {name.replace('_', ' ')} {count}" for name, count in compared.items())]


def percent(text: str) -> float:
    """`10%` or `10` as 10.0."""
    try:
        return float(text.removesuffix("%"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 10%") from None
