"""python -m deploy certificate make [--name localhost --name 10.0.0.7] [--days 90]
python -m deploy certificate renew
python -m deploy certificate client NAME
python -m deploy certificate show

TLS certificates of the gateway, signed by an authority of their own, for where there is no public one. `make` leaves what is
there and still good; `renew` makes a new key and certificate, and running gateways of the state directory take them without
dropping a request. `client` makes a certificate for mutual TLS.
"""

from __future__ import annotations

import argparse
import time
from datetime import datetime, timezone
from typing import Any

from deploy import certificates
from deploy.commands.state import add_state, state_of
from deploy.gateway_reload import reload_gateways


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `certificate`."""
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    make = actions.add_parser("make", help="an authority and a server certificate")
    renew = actions.add_parser("renew", help="a new key and certificate for the same names")
    client = actions.add_parser("client", help="a client's certificate, for mutual TLS")
    client.add_argument("name", metavar="NAME")
    show = actions.add_parser("show", help="files, names and expiry")
    for action in (make, renew):
        action.add_argument(
            "--name", action="append", dest="names", metavar="HOST",
            help="host name or IP address, may be repeated (default: "
            + ("localhost and its addresses)" if action is make else "those of the present one)"),
        )  # fmt: skip
    for action in (make, renew, client):
        action.add_argument(
            "--days",
            type=int,
            default=certificates.SERVER_DAYS,
            metavar="N",
            help="valid (default %(default)s)",
        )
    for action in (make, renew, client, show):
        add_state(action)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`certificate`; raises DeployError."""
    directory = state_of(options) / "tls"
    if options.action == "client":
        certificate, key = certificates.make_client(directory, options.name, options.days)
        return {
            "certificate": str(certificate),
            "key": str(key),
            **_expiry(certificates.expiry_unix_s(certificate)),
        }
    answer: dict[str, Any] = {}
    if options.action == "make":
        files = certificates.make(directory, options.names or certificates.DEFAULT_NAMES, options.days)
    elif options.action == "renew":
        files = certificates.renew(directory, options.days, options.names or ())
        answer["reloaded"] = reload_gateways(state_of(options))
    else:
        files = certificates.CertificateFiles(directory)
    return {
        "ca": str(files.ca),
        "certificate": str(files.certificate),
        "key": str(files.key),
        "names": certificates.names_of(files.certificate),
        **_expiry(certificates.expiry_unix_s(files.certificate)),
        **answer,
    }


def _expiry(unix_s: float) -> dict[str, Any]:
    expires = datetime.fromtimestamp(unix_s, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"expires": expires, "days_left": round((unix_s - time.time()) / 86_400, 2)}
