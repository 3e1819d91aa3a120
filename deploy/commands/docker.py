"""python -m deploy docker secrets
python -m deploy docker up --profile cpu
python -m deploy docker down

The service in containers (docker/compose.yaml). `secrets` makes what is missing in the directory CLOTLINE_SECRETS of docker/.env:
random passwords, a certificate, an empty set of API keys. `check` names all that would keep `up` from starting. `up` returns
when every container is healthy, and takes a failed start back. `down` keeps the volumes. See docs/deployment.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploy import containers
from deploy.errors import UsageError

ACTIONS = ("secrets", "check", "up", "down", "status", "logs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument(
        "--profile", choices=containers.PROFILES, default="cpu", help="what to run (default %(default)s)"
    )
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="NAME",
        help="`secrets`: name or address of the gateway, may be repeated",
    )
    parser.add_argument(
        "--env",
        type=Path,
        default=containers.ENV,
        metavar="FILE",
        help="`secrets`, `check`: variables (default docker/.env)",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do one of them."""
    if options.action in ("secrets", "check"):
        if not options.env.is_file():
            raise UsageError(f"{options.env} is missing: copy docker/.env.example there and fill it in.")
        env = containers.read_env(options.env)
        project = options.env.resolve().parent
        if options.action == "check":
            containers.check(env, project)
            return {"status": "complete"}
        if not env.get("CLOTLINE_SECRETS"):
            raise UsageError(f"{options.env}: CLOTLINE_SECRETS is empty; it names the directory of secrets.")
        directory = project / env["CLOTLINE_SECRETS"]
        return {"directory": str(directory), "made": containers.make_secrets(directory, tuple(options.name))}
    if options.action == "up":
        return containers.up(options.profile)
    words = {"down": ["down"], "status": ["ps", "--all"], "logs": ["logs", "--tail", "50"]}[options.action]
    return {"action": options.action, "exit_code": containers.run(*words)}
