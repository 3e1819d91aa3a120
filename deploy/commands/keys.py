"""python -m deploy keys add NAME [--rate R] [--burst B] [--class batch] [--in-flight N]
python -m deploy keys rotate NAME --grace 86400
python -m deploy keys revoke NAME [--number N]
python -m deploy keys list

API keys of the gateway's clients. `add` and `rotate` show the new key once, in the last line; what NAME.NUMBER stands for in
the access log, `list` tells. Running gateways of the state directory take every change at once, without dropping a request.
"""

from __future__ import annotations

import argparse
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from deploy.commands.state import add_state, state_of
from deploy.gateway_reload import reload_gateways
from deploy.keys import CLASSES, KeyStore, Limits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `keys`."""
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    add = actions.add_parser("add", help="a new client, and its key")
    add.add_argument("name", metavar="NAME", help="of the client: a-z, 0-9 and -")
    add.add_argument(
        "--rate", type=float, metavar="R", help="requests a second in the long run (default: no limit)"
    )
    add.add_argument(
        "--burst",
        type=int,
        default=20,
        metavar="B",
        help="requests above the rate at once (default %(default)s)",
    )
    add.add_argument(
        "--class", dest="client_class", choices=CLASSES, default="interactive",
        help="batch has fewer places in flight than interactive, and takes none from it (default %(default)s)",
    )  # fmt: skip
    add.add_argument(
        "--in-flight", type=int, metavar="N", help="requests at once (default: the places of its class)"
    )
    rotate = actions.add_parser("rotate", help="a new key; the old one goes on for a while")
    rotate.add_argument("name", metavar="NAME")
    rotate.add_argument(
        "--grace",
        type=float,
        default=86_400,
        metavar="S",
        help="seconds that old keys go on (default %(default)s)",
    )
    revoke = actions.add_parser("revoke", help="end a client, or one of its keys")
    revoke.add_argument("name", metavar="NAME")
    revoke.add_argument("--number", type=int, metavar="N", help="of the key; default: all of them")
    for action in (
        add,
        rotate,
        revoke,
        actions.add_parser("list", help="clients, limits and key ids, without the keys"),
    ):
        add_state(action)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`keys`; raises DeployError."""
    store = KeyStore(_directory(state_of(options)))
    if options.action == "list":
        return {"clients": _listed(store), "directory": str(store.directory)}
    answer: dict[str, Any] = {"client": options.name}
    if options.action == "add":
        limits = Limits(options.rate, options.burst, options.client_class, options.in_flight)
        answer["key"] = store.add(options.name, limits)
    elif options.action == "rotate":
        answer["key"] = store.rotate(options.name, options.grace)
    else:
        answer["revoked"] = store.revoke(options.name, options.number)
    client = store.clients().get(options.name)
    if client and "key" in answer:
        answer["key_id"] = client.key_id(client.keys[-1])
    return {**answer, "reloaded": reload_gateways(state_of(options))}


def _directory(state: Path) -> Path:
    return state / "keys"


def _listed(store: KeyStore) -> list[dict[str, Any]]:
    now = time.time()
    return [
        {
            "client": client.name,
            "class": client.limits.client_class,
            "rate_per_s": client.limits.rate_per_s,
            "burst": client.limits.burst,
            "in_flight": client.limits.in_flight,
            "keys": [
                {
                    "id": client.key_id(key),
                    "created": _time(key.created_unix_s),
                    "expires": _time(key.expires_unix_s) if key.expires_unix_s else None,
                }
                for key in client.keys
                if key.expires_unix_s is None or key.expires_unix_s > now
            ],
        }
        for client in store.clients().values()
    ]


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
