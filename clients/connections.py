"""A few threads, each with a connection of its own; calls are retried within their deadline."""

from __future__ import annotations

import dataclasses
import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from clients.access import NO_ACCESS, Access
from clients.address import Address
from clients.errors import RETRIED, ClientError, ClosedError, DeadlineExceeded, ServerBusy
from clients.transport import Transport, open_transport

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
CLOSING_S = 2.0

T = TypeVar("T")
Call = Callable[[Transport, float], T]


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long to try.

    Attributes:
        timeout_s: deadline of one call, its retries and pauses included; > 0.
        retries: further attempts after a broken connection or a busy server; >= 0.
    """

    timeout_s: float = 30.0
    retries: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s <= 86_400:
            raise ValueError(f"timeout_s must be above 0 and at most 86400 s, not {self.timeout_s!r}")
        if self.retries < 0:
            raise ValueError(f"retries must be 0 or more, not {self.retries!r}")


def call_with_patience(call: Call[T], transport: Transport, patience: Patience) -> T:
    """Call until it works, `retries` are used up, or the deadline is near. Inference is free of side effects,
    so a request whose answer got lost may be sent again.

    Raises:
        DeadlineExceeded: the time is up.
        ClientError: whatever the last attempt raised.
    """
    started_s = time.monotonic()
    pause_s = FIRST_PAUSE_S
    for attempt in range(patience.retries + 1):
        left_s = patience.timeout_s - (time.monotonic() - started_s)
        if left_s <= 0:
            raise DeadlineExceeded(
                f"no answer within {patience.timeout_s:g} s ({attempt} attempts); raise timeout_s"
            )
        try:
            return call(transport, left_s)
        except RETRIED as error:
            left_s = patience.timeout_s - (time.monotonic() - started_s)
            now_s = _pause_s(pause_s, error)
            if attempt == patience.retries or left_s <= now_s:
                raise
        time.sleep(now_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _pause_s(pause_s: float, error: ClientError) -> float:
    """Seconds to wait, with jitter, so that many clients do not come back at the same moment; not less than the server
    asks for."""
    jitter = random.uniform(0.5, 1.0)  # noqa: S311 (no secret)
    asked_s = error.retry_after_s if isinstance(error, ServerBusy) else None
    return max(pause_s * jitter, asked_s * (0.5 + jitter) if asked_s else 0.0)


class Connections:
    """`size` threads that each own one transport. Thread-safe: any thread may submit."""

    def __init__(
        self, address: Address, *, size: int, patience: Patience, access: Access = NO_ACCESS
    ) -> None:
        self._address = address
        self._access = access
        self._patience = patience
        self._size = size
        self._threads: list[threading.Thread] = []
        self._calls: queue.SimpleQueue[tuple[Future[Any], Call[Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, call: Call[T]) -> Future[T]:
        """Run `call(transport, timeout_s)` on a connection that is free, or once one is.

        Raises:
            ClosedError: after `close`.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise ClosedError(f"this client of {self._address} is closed; make a new SlideClient")
            if len(self._threads) < self._size:
                # Daemons: a program that forgets to close the client, or is interrupted, still ends.
                thread = threading.Thread(
                    target=self._serve, name=f"{self._address}#{len(self._threads)}", daemon=True
                )
                self._threads.append(thread)
                thread.start()
            self._calls.put((future, call))
        return future

    def close(self, wait_s: float = CLOSING_S) -> None:
        """Cancel what has not begun and close every connection; waits at most `wait_s` for calls under
        way."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            while not self._calls.empty():
                entry = self._calls.get()
                if entry is not None:
                    entry[0].cancel()
            for _ in self._threads:
                self._calls.put(None)
        give_up_s = time.monotonic() + wait_s
        for thread in self._threads:
            thread.join(max(0.0, give_up_s - time.monotonic()))

    def _serve(self) -> None:
        transport = open_transport(self._address, self._access)
        try:
            while (entry := self._calls.get()) is not None:
                future, call = entry
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    future.set_result(call_with_patience(call, transport, self._patience))
                except BaseException as error:  # it belongs to whoever waits for the future
                    future.set_exception(error)
                del entry, future, call  # no tiles kept alive while waiting
        finally:
            transport.close()
