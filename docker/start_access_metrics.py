"""python start_access_metrics.py CERTIFICATE...: what `python -m deploy access-metrics` does, and keeps the access log short.

In containers nothing else does: nginx writes it into memory that both share, and cannot be told from here to open it anew. So
it is cut right after it was read to its end.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from prometheus_client import start_http_server

from deploy.access_metrics import AccessMetrics, CertificateExpiry, LogFollower

LOG = Path("/logs/access.log")
LOG_BYTES = 16 << 20
HOST, PORT = "0.0.0.0", 8004  # noqa: S104  # nosec B104
EVERY_S = 0.5


def count(metrics: AccessMetrics, follower: LogFollower, log: Path, most_bytes: int) -> None:
    """Count what is new; begin the log again if it is long."""
    for line in follower.lines():
        metrics.line(line)
    if log.exists() and log.stat().st_size > most_bytes:
        for line in follower.lines():
            metrics.line(line)
        os.truncate(log, 0)  # nginx appends: it goes on at the beginning


if __name__ == "__main__":
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    metrics = AccessMetrics()
    metrics.registry.register(CertificateExpiry([Path(path) for path in sys.argv[1:]]))
    follower = LogFollower(LOG)
    start_http_server(PORT, HOST, metrics.registry)
    while not stop.wait(EVERY_S):
        count(metrics, follower, LOG, LOG_BYTES)
