"""python -m deploy.benchmarks gateway-cost --repository runs/perf/resnet18

Measurements of the gateway before a real server; both are started for it. The last line of standard output is one JSON
document; exit code 1 if a bar was missed.
"""

from __future__ import annotations

import sys

from serving.commands import Command, main

COMMANDS = {
    "gateway-cost": Command(
        "deploy.benchmarks.gateway_cost", "throughput and latency with and without the gateway"
    ),
    "overload": Command(
        "deploy.benchmarks.overload", "twice the load that fits: refusals, latency, recovery"
    ),
    "attacks": Command("deploy.benchmarks.attacks", "10,000 bad requests beside good ones"),
    "rotation": Command("deploy.benchmarks.rotation", "keys and certificates changed under load"),
    "canary": Command(
        "deploy.benchmarks.canary", "a candidate started, given a share and promoted under load"
    ),
}

if __name__ == "__main__":
    sys.exit(main(__doc__, COMMANDS, program="python -m deploy.benchmarks"))
