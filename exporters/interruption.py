"""Ctrl-C and SIGTERM while libraries in C++ are at work."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator

from exporters.errors import ExportError


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt, and set the event; to be entered in the main thread.

    The event is for an interrupt that arrives inside a destructor or callback of a library: Python prints that one
    and drops it, and the export would go on. One that arrives while a module is being imported is sent again a moment
    later: extension modules in C++ end the whole process when an exception comes out of their import.
    """
    interrupted = threading.Event()

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        interrupted.set()
        if _is_importing(frame):
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            return
        raise KeyboardInterrupt

    def unraisable(dropped: sys.UnraisableHookArgs) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(dropped)

    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        yield interrupted
    except ExportError:
        if interrupted.is_set():  # a library turned the interrupt into an error of its own
            raise KeyboardInterrupt from None
        raise
    finally:
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _is_importing(frame: types.FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
