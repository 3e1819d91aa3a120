from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import numpy as np
import pytest

from clients.address import parse_address
from clients.errors import (
    AccessRefused,
    ClientError,
    DeadlineExceeded,
    ModelNotReady,
    RequestRefused,
    ServerBusy,
    ServerFault,
    ServerUnreachable,
)
from clients.transport import _tile_array, error_of, open_transport


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port where connections are taken and nothing is ever answered."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("message", "status", "expected"),
    [
        ("Request for unknown model: 'm' is not found", "400", ModelNotReady),
        ("Request for unknown model: 'm' has no available versions", "StatusCode.UNAVAILABLE", ModelNotReady),
        ("m version 9 is not at ready state", "503", ModelNotReady),
        ("no such page", "404", ModelNotReady),
        ("Exceeds maximum queue size", "503", ServerBusy),
        ("Exceeds maximum queue size", "StatusCode.UNAVAILABLE", ServerBusy),
        ("slow down", "429", ServerBusy),
        ("failed to connect to all addresses", "StatusCode.UNAVAILABLE", ServerUnreachable),
        ("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED", DeadlineExceeded),
        ("tile 0 is no image", "400", RequestRefused),
        ("tile 0 is no image", "StatusCode.INVALID_ARGUMENT", RequestRefused),
        ("unauthorized", "401", AccessRefused),
        ("not offered", "StatusCode.PERMISSION_DENIED", AccessRefused),
        ("too many requests a second for this key", "StatusCode.RESOURCE_EXHAUSTED", ServerBusy),
        ("message larger than max", "StatusCode.RESOURCE_EXHAUSTED", RequestRefused),
        ("Stub process is not healthy", "500", ServerFault),
        ("Stub process is not healthy", "StatusCode.INTERNAL", ServerFault),
    ],
)
def test_the_servers_words_become_errors_of_ours(
    message: str, status: str, expected: type[ClientError]
) -> None:
    error = error_of(message, status, model="m", address=parse_address("localhost:8000"))
    assert type(error) is expected
    assert message in str(error) or expected is DeadlineExceeded
    assert "localhost:8000" in str(error)
    assert error.status == status


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_closed_port_is_unreachable(scheme: str, unused_port: int) -> None:
    transport = open_transport(parse_address(f"{scheme}://127.0.0.1:{unused_port}"))
    with pytest.raises(
        ServerUnreachable, match=rf"{scheme}://127.0.0.1:{unused_port}: no connection.*port right"
    ):
        transport.model_versions("m", 5.0)
    transport.close()


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_the_deadline_holds_where_nothing_is_answered(scheme: str, silent_port: int) -> None:
    transport = open_transport(parse_address(f"{scheme}://127.0.0.1:{silent_port}"))
    started_s = time.monotonic()
    with pytest.raises((DeadlineExceeded, ServerUnreachable)):
        transport.infer("m", [b"tile"], 0.5)
    assert 0.4 < time.monotonic() - started_s < 3
    transport.close()


def test_a_name_that_does_not_resolve_is_unreachable() -> None:
    transport = open_transport(parse_address("http://no-such-host.invalid:8000"))
    with pytest.raises(ServerUnreachable):
        transport.model_versions("m", 10.0)
    transport.close()


def test_tiles_keep_their_trailing_zero_bytes() -> None:
    tiles = [b"\x01\x00\x00", b"\x00", b""]
    array_N1 = _tile_array(tiles)
    assert array_N1.shape == (3, 1)
    assert array_N1.dtype == np.object_
    assert list(array_N1[:, 0]) == tiles
