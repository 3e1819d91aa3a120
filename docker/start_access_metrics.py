"""python start_access_metrics.py [OPTION...]: `python -m deploy access-metrics`, which also keeps the access log short.

In containers nothing else does: nginx writes it into memory that both share. They share process ids too (`pid: service:gateway`
in compose.yaml), where nginx is number 1: it is told to open the log anew when that was renamed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from deploy.__main__ import COMMANDS
from deploy.local_supervisor import move_aside
from serving.commands import main

LOG = Path("/logs/access.log")
LOG_BYTES = 8 << 20
EVERY_S = 5.0
NGINX = 1


def keep_short(stop: threading.Event) -> None:
    """Have nginx begin a new log whenever it has written LOG_BYTES."""
    while not stop.wait(EVERY_S):
        if move_aside(LOG, LOG_BYTES):
            os.kill(NGINX, signal.SIGUSR1)


if __name__ == "__main__":
    stop = threading.Event()
    threading.Thread(target=keep_short, args=(stop,), daemon=True).start()
    sys.exit(main(__doc__, COMMANDS, ["access-metrics", "--log", str(LOG), *sys.argv[1:]]))
