"""python -m serving up --repository model_repository

Runs Triton Inference Server on a model repository: `install` puts the embedded tritonserver into .triton/, `up`
starts one and proves it before it says ready, `status` lists the running ones, `down` stops them. The last line of
standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
from pathlib import Path

from serving.embedded import TRITON_VERSION, install, triton_home
from serving.errors import InstanceError, ServingError
from serving.instances import instances, stop_instance
from serving.launcher import UpOptions, up, up_detached


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(
        prog="python -m serving", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = main.add_subparsers(dest="command", required=True)

    command = commands.add_parser("install", help="put the embedded tritonserver into .triton/")
    command.add_argument("--force", action="store_true", help="install again even if it is there")

    command = commands.add_parser(
        "up", allow_abbrev=False, help="start a server, prove it, and wait (Ctrl-C stops it)"
    )
    command.add_argument("--repository", type=Path, required=True, help="Triton model repository")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    command.add_argument(
        "--http-port", type=int, default=8000, help="0 takes a free one (default %(default)s)"
    )
    command.add_argument(
        "--grpc-port", type=int, default=8001, help="0 takes a free one (default %(default)s)"
    )
    command.add_argument(
        "--metrics-port", type=int, default=8002, help="0 takes a free one (default %(default)s)"
    )
    command.add_argument("--name", help="name of this instance (default: its HTTP port)")
    command.add_argument(
        "--tritonserver", metavar="PATH", help="this binary instead of PATH, /opt/tritonserver, embedded"
    )
    command.add_argument(
        "--timeout-s", type=float, default=120.0, help="to be ready within (default %(default)s)"
    )
    command.add_argument(
        "--detach", action="store_true", help="return once it is ready, leaving it in the background"
    )
    command.add_argument("--triton-arg", action="append", default=[], metavar="ARG",
                         help="passed on to tritonserver, e.g. --triton-arg=--log-verbose=1; may be repeated")  # fmt: skip

    command = commands.add_parser("down", help="stop one server, or all of this checkout")
    command.add_argument("--name", help="only this instance")
    command.add_argument("--timeout-s", type=float, default=30.0, help="then kill it (default %(default)s)")

    commands.add_parser("status", help="list the servers of this checkout")
    return main


def run_install(force: bool) -> int:
    """`serving install`."""
    home = triton_home()
    fresh = install(home, force=force)
    print(
        f"serving: tritonserver {TRITON_VERSION} {'installed' if fresh else 'is there already'} in {home}",
        file=sys.stderr,
    )
    print(json.dumps({"installed": str(home), "fresh": fresh, "version": TRITON_VERSION}))
    return 0


def run_down(name: str | None, timeout_s: float) -> int:
    """`serving down`."""
    home = triton_home()
    chosen = [state for state in instances(home) if name in (None, state.name)]
    if name and not chosen:
        raise InstanceError(f"no server named {name} is up; `python -m serving status` lists them.")
    clean = True
    for state in chosen:
        clean = stop_instance(home, state, timeout_s) and clean
        print(f"serving: {state.name} on {state.http} stopped", file=sys.stderr)
    if not chosen:
        print("serving: no server is up", file=sys.stderr)
    print(json.dumps({"stopped": [state.name for state in chosen], "clean": clean}))
    return 0 if clean else 1


def is_ready(address: str) -> bool:
    """True if a server answers /v2/health/ready at `host:port` within 2 s."""
    connection = http.client.HTTPConnection(address, timeout=2)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def run_status() -> int:
    """`serving status`."""
    rows = []
    for state in instances(triton_home()):
        status = "not ready" if state.status == "ready" and not is_ready(state.http) else state.status
        rows.append({"name": state.name, "status": status, "http": state.http, "grpc": state.grpc,
                     "metrics": state.metrics, "pid": state.launcher_pid, "repository": state.repository})  # fmt: skip
        print(f"{state.name:16}{status:10} http {state.http}  grpc {state.grpc}  {state.repository}")
    if not rows:
        print("no server is up")
    print(json.dumps({"servers": rows}))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    try:
        if options.command == "install":
            return run_install(options.force)
        if options.command == "down":
            return run_down(options.name, options.timeout_s)
        if options.command == "status":
            return run_status()
        if options.detach:
            rest = [argument for argument in arguments[1:] if argument != "--detach"]
            print(up_detached(rest, triton_home(), options.timeout_s))
            return 0
        return up(
            UpOptions(
                repository=options.repository,
                home=triton_home(),
                host=options.host,
                http_port=options.http_port,
                grpc_port=options.grpc_port,
                metrics_port=options.metrics_port,
                name=options.name,
                tritonserver=options.tritonserver,
                timeout_s=options.timeout_s,
                extra=options.triton_arg,
            )
        )
    except (ServingError, OSError) as error:  # OSError: .triton cannot be written, the disk is full
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
