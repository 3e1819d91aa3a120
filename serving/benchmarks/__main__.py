"""python -m serving.benchmarks kills --repository model_repository

Measurements of `serving` on a real server that they start themselves. The last line of standard output is one JSON
document; exit code 1 if a bar was missed.
"""

from __future__ import annotations

import sys

from serving.commands import Command, main

COMMANDS = {
    "bad-requests": Command("serving.benchmarks.bad_requests", "good and bad requests mixed, of every kind"),
    "kills": Command("serving.benchmarks.kills", "kill -9 of every kind of child under load"),
    "queue-policies": Command(
        "serving.benchmarks.queue_policies", "what bounded queues of the dynamic batcher cost"
    ),
    "releases": Command("serving.benchmarks.releases", "release and rollback under load"),
}

if __name__ == "__main__":
    sys.exit(main(__doc__, COMMANDS, program="python -m serving.benchmarks"))
