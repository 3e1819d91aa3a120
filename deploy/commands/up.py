"""python -m deploy up
python -m deploy up --release RELEASE --gateway-host 0.0.0.0

Brings the guarded service up on this machine, without Docker and without root: tritonserver under the supervision of
`serving`, nginx before it (TLS, API keys, limits), Prometheus and Alertmanager with the files of docker/. It returns when all
is ready; `python -m deploy down` ends it. What is up already is changed where the options say so, options that are not named
keep their values; a release moves in without a failed request. What fails is undone. See docs/deployment.md.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from deploy.commands.state import add_state, state_of
from deploy.local import Order, up
from deploy.local_settings import PORT_NAMES, LocalSettings, Ports, absolute

DEFAULTS = {field.name: field.default for field in fields(LocalSettings)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--release",
        type=Path,
        metavar="DIR",
        help="Release to serve (default: runs/demo/release, else model_repository)",
    )
    parser.add_argument("--repository", type=Path, metavar="DIR", help="a model repository as it is instead")
    parser.add_argument(
        "--live",
        type=Path,
        metavar="DIR",
        help="live directory that outlasts the stack (default: one that does not)",
    )
    parser.add_argument(
        "--gateway-host", metavar="ADDRESS",
        help=f"address of the gateway, the only part that others can reach (default {DEFAULTS['gateway_host']})",
    )  # fmt: skip
    parser.add_argument(
        "--gateway-name", action="append", metavar="NAME", dest="gateway_names",
        help="name or address that clients use, for the certificate; may be repeated (localhost is in it)",
    )  # fmt: skip
    for name in PORT_NAMES:
        parser.add_argument(
            f"--{name.replace('_', '-')}-port", type=int, metavar="N",
            help=f"0 takes a free one (default {getattr(Ports(), name)})",
        )  # fmt: skip
    parser.add_argument(
        "--mlflow",
        action=argparse.BooleanOptionalAction,
        help="MLflow on runs/mlflow.db as well (default: no)",
    )
    parser.add_argument("--metrics-days", type=int, metavar="N",
                        help=f"Prometheus keeps them so long (default {DEFAULTS['metrics_days']})")  # fmt: skip
    parser.add_argument("--metrics-mb", type=int, metavar="N",
                        help=f"and so much of them (default {DEFAULTS['metrics_mb']})")  # fmt: skip
    parser.add_argument("--timeout-s", type=float, metavar="S",
                        help=f"for tritonserver to be ready within (default {DEFAULTS['timeout_s']:.0f})")  # fmt: skip
    add_state(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Bring it up; returns addresses, key file and processes."""
    settings = {
        "repository": absolute(options.repository),
        "release": absolute(options.release),
        "live": absolute(options.live),
        "gateway_host": options.gateway_host,
        "gateway_names": tuple(options.gateway_names) if options.gateway_names else None,
        "mlflow": options.mlflow,
        "metrics_days": options.metrics_days,
        "metrics_mb": options.metrics_mb,
        "timeout_s": options.timeout_s,
    }
    ports = {name: getattr(options, f"{name}_port") for name in PORT_NAMES}
    told = {name: port for name, port in ports.items() if port is not None}
    return up(Order(state_of(options), settings, told))
