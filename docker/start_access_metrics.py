"""python start_access_metrics.py [OPTION...]: `python -m deploy access-metrics`, which also keeps the access log short.

In containers nothing else cuts the log: nginx writes it into memory that both share.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from deploy.__main__ import COMMANDS
from deploy.local_supervisor import rotate
from serving.commands import main

LOG = Path("/logs/access.log")
LOG_BYTES = 8 << 20
EVERY_S = 5.0


def keep_short(stop: threading.Event) -> None:
    """Cut the log whenever it has grown over LOG_BYTES."""
    while not stop.wait(EVERY_S):
        rotate(LOG, LOG_BYTES)


if __name__ == "__main__":
    stop = threading.Event()
    threading.Thread(target=keep_short, args=(stop,), daemon=True).start()
    sys.exit(main(__doc__, COMMANDS, ["access-metrics", "--log", str(LOG), *sys.argv[1:]]))
