"""python -I serving/guardian.py: runs tritonserver and outlives the launcher only as long as it takes to clean up.

The launcher (`python -m serving up`) holds the guardian's standard input. Its first line is a JSON document:
`{"argv": [...], "env": {...}, "log": PATH, "instance": ID, "state_file": PATH,
"directory": PATH, "secret": TEXT}`. After that
  a line `stop S`   stops the server gracefully: SIGTERM, then SIGKILL after S seconds;
  end of file       means that the launcher died, however it died: the server is stopped at once, and its state file
                    and directory are removed, which a living launcher does itself.
Either way the server's stubs and shared memory are gone when the guardian ends. It answers on standard output with
one JSON line each: the server has `started`; it has `exited`; all of it is gone (`ended`). It runs in a session of its own, so that Ctrl-C
in the launcher's terminal reaches the launcher alone. If the guardian itself is killed, the kernel kills tritonserver
(PR_SET_PDEATHSIG, prctl(2)) and the launcher sweeps up.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from processes import overwrite_argument, sweep  # type: ignore[import-not-found]

ORPHAN_GRACE_S = 1.5
PARSED_S = 5.0
orphaned = threading.Event()
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """Run in the child before exec: the kernel kills it when the guardian dies."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def say(message: dict[str, object]) -> None:
    """One JSON line to the launcher, which may be gone."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


def stop(server: subprocess.Popen[bytes], grace_s: float) -> None:
    """SIGTERM, and SIGKILL if that is not enough."""
    with contextlib.suppress(ProcessLookupError):
        server.terminate()
    try:
        server.wait(grace_s)
    except subprocess.TimeoutExpired:
        server.kill()


def obey(server: subprocess.Popen[bytes]) -> None:
    """Wait for the launcher's word, or for its end."""
    line = sys.stdin.readline()
    if not line:
        orphaned.set()
    stop(server, float(line.split()[1]) if line.startswith("stop ") else ORPHAN_GRACE_S)


def hide(server: subprocess.Popen[bytes], secret: str, log: str, written_bytes: int) -> None:
    """Overwrite the admin token in the server's command line, which every local user can read.

    tritonserver takes it from there only. Its first line in the log says that the command line has been read.
    """
    deadline = time.monotonic() + PARSED_S
    while os.path.getsize(log) <= written_bytes and server.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    say({"event": "hidden", "hidden": overwrite_argument(server.pid, secret)})


def main() -> None:
    """Start the server, wait for its end, clean up."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(ignored, signal.SIG_IGN)
    order = json.loads(sys.stdin.readline())
    written_bytes = os.path.getsize(order["log"])
    with open(order["log"], "ab") as log:
        server = subprocess.Popen(
            order["argv"],
            env=order["env"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,
            restore_signals=True,
        )
    say({"event": "started", "pid": server.pid})
    threading.Thread(target=obey, args=(server,), daemon=True).start()
    hiding = (server, order["secret"], order["log"], written_bytes)
    threading.Thread(target=hide, args=hiding, daemon=True).start()
    returncode = server.wait()
    say({"event": "exited", "returncode": returncode})
    sweep(order["instance"])
    if orphaned.is_set():
        shutil.rmtree(order["directory"], ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(order["state_file"])
    say({"event": "ended", "returncode": returncode})
    os._exit(0)


if __name__ == "__main__":
    main()
