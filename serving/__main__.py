"""python -m serving up --repository model_repository

Runs Triton Inference Server on a model repository: `install` puts the embedded tritonserver into .triton/, `up`
starts one and proves it before it says ready, `status` lists the running ones, `down` stops them. `release`, `rollback`
and `follow` change the models of a running one. The last line of standard output is one JSON document.
"""

from __future__ import annotations

import sys

from serving.commands import Command, main

COMMANDS = {
    "install": Command("serving.commands.install", "put the embedded tritonserver into .triton/"),
    "up": Command("serving.commands.up", "start a server, prove it, and keep proving it (Ctrl-C stops it)"),
    "down": Command("serving.commands.down", "stop one server, or all of this checkout"),
    "status": Command("serving.commands.status", "list the servers of this checkout"),
    "backends": Command("serving.commands.backends", "name the backends that a server here would have"),
    "release": Command(
        "serving.releases.release_command", "move a running server to a Release, without a failed request"
    ),
    "rollback": Command(
        "serving.releases.rollback_command", "move a running server back to the Release before"
    ),
    "follow": Command(
        "serving.releases.follow_command", "keep servers on the Release that an MLflow alias names"
    ),
}

if __name__ == "__main__":
    sys.exit(main(__doc__, COMMANDS))
