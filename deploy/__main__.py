"""python -m deploy up

Runs Clotline as a service: the gateway (nginx) and monitoring (Prometheus, Alertmanager) around a tritonserver that
`serving` supervises. The last line of standard output is one JSON document.
"""

from __future__ import annotations

import sys

from serving.commands import Command, main

COMMANDS: dict[str, Command] = {
    "up": Command("deploy.commands.up", "bring the guarded service up on this machine, or change it"),
    "down": Command("deploy.commands.down", "stop it; nothing of it is left running"),
    "status": Command("deploy.commands.status", "what runs, whether it is ready, and where"),
    "canary": Command(
        "deploy.commands.canary", "try a release on a share of the requests: start, promote, stop"
    ),
    "shadow": Command(
        "deploy.commands.shadow", "compare the answers of two servers (the gateway sends it copies)"
    ),
    "docker": Command("deploy.commands.docker", "the service in containers: secrets, check, up, down"),
    "logs": Command("deploy.commands.logs", "the logs of its parts"),
    "keys": Command("deploy.commands.keys", "API keys of the gateway's clients: add, rotate, revoke, list"),
    "certificate": Command("deploy.commands.certificate", "the gateway's TLS certificate: make, renew, show"),
    "access-metrics": Command("deploy.commands.access_metrics", "the gateway's metrics, from its access log"),
    "dashboards": Command(
        "deploy.commands.dashboards", "write Grafana's dashboards, or check that they are up to date"
    ),
    "preview": Command("deploy.commands.preview", "the dashboards as a page, from a running Prometheus"),
}

if __name__ == "__main__":
    sys.exit(main(__doc__, COMMANDS, program="python -m deploy"))
