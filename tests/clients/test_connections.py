from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from clients.address import parse_address
from clients.connections import Connections, Patience, call_with_patience
from clients.errors import ClosedError, DeadlineExceeded, RequestRefused, ServerBusy, ServerUnreachable
from clients.transport import Transport, open_transport

ADDRESS = parse_address("127.0.0.1:1")


def failing(times: int, error: Exception) -> tuple[Callable[[Transport, float], str], list[float]]:
    """A call that raises `times` times, then answers; and the seconds that each attempt was given."""
    given_s: list[float] = []

    def call(transport: Transport, timeout_s: float) -> str:
        given_s.append(timeout_s)
        if len(given_s) <= times:
            raise error
        return "answer"

    return call, given_s


@pytest.mark.parametrize("error", [ServerBusy("busy"), ServerUnreachable("gone")])
def test_passing_trouble_is_tried_again_with_what_time_is_left(error: Exception) -> None:
    call, given_s = failing(2, error)
    assert call_with_patience(call, open_transport(ADDRESS), Patience(10.0, retries=2)) == "answer"
    assert len(given_s) == 3
    assert given_s[0] > given_s[1] > given_s[2] > 8


def test_retries_end() -> None:
    call, given_s = failing(9, ServerBusy("busy"))
    with pytest.raises(ServerBusy):
        call_with_patience(call, open_transport(ADDRESS), Patience(10.0, retries=1))
    assert len(given_s) == 2


def test_what_would_fail_again_is_not_tried_again() -> None:
    call, given_s = failing(1, RequestRefused("no image"))
    with pytest.raises(RequestRefused):
        call_with_patience(call, open_transport(ADDRESS), Patience())
    assert len(given_s) == 1


def test_retries_stop_at_the_deadline() -> None:
    call, given_s = failing(99, ServerBusy("busy"))
    started_s = time.monotonic()
    with pytest.raises((ServerBusy, DeadlineExceeded)):
        call_with_patience(call, open_transport(ADDRESS), Patience(0.5, retries=99))
    assert time.monotonic() - started_s < 0.7
    assert len(given_s) >= 2


@pytest.mark.parametrize(
    ("timeout_s", "retries"), [(0, 1), (-1, 1), (float("nan"), 1), (float("inf"), 1), (1, -1)]
)
def test_impossible_patience_is_refused(timeout_s: float, retries: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        Patience(timeout_s, retries)


def test_calls_run_side_by_side_each_on_its_own_connection() -> None:
    connections = Connections(ADDRESS, size=2, patience=Patience())
    both = threading.Barrier(2, timeout=5)

    def meet(transport: Transport, timeout_s: float) -> int:
        both.wait()  # breaks unless the other call runs at the same time
        return id(transport)

    futures = [connections.submit(meet) for _ in range(2)]
    assert len({future.result(timeout=5) for future in futures}) == 2
    connections.close()


def test_a_closed_client_says_so_and_leaves_no_thread() -> None:
    before = threading.active_count()
    connections = Connections(ADDRESS, size=2, patience=Patience())
    connections.submit(lambda transport, timeout_s: None).result(timeout=5)
    connections.close()
    connections.close()
    assert threading.active_count() == before
    with pytest.raises(ClosedError, match="make a new SlideClient"):
        connections.submit(lambda transport, timeout_s: None)


def test_closing_cancels_what_has_not_begun() -> None:
    connections = Connections(ADDRESS, size=1, patience=Patience())
    began, release = threading.Event(), threading.Event()

    def run(transport: Transport, timeout_s: float) -> bool:
        began.set()
        return release.wait(5)

    running = connections.submit(run)
    waiting = connections.submit(lambda transport, timeout_s: None)
    assert began.wait(30)
    threading.Timer(0.1, release.set).start()
    connections.close()
    assert running.result(timeout=5) is True
    assert waiting.cancelled()
