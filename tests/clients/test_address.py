from __future__ import annotations

import pytest

from clients.address import Address, parse_address
from clients.errors import AddressError, ClientError


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost:8000", Address("http", "localhost", 8000)),
        ("localhost", Address("http", "localhost", 8000)),
        (" triton.lab:80 ", Address("http", "triton.lab", 80)),
        ("http://10.0.0.7:9000/", Address("http", "10.0.0.7", 9000)),
        ("https://gateway/clot/line/", Address("https", "gateway", 443, "/clot/line")),
        ("grpc://localhost", Address("grpc", "localhost", 8001)),
        ("grpcs://host:8443", Address("grpcs", "host", 8443)),
        ("[::1]:8000", Address("http", "::1", 8000)),
    ],
)
def test_urls_name_addresses(url: str, expected: Address) -> None:
    assert parse_address(url) == expected


def test_an_address_is_written_as_tritonclient_takes_it() -> None:
    assert parse_address("https://gateway/clot").authority == "gateway:443/clot"
    assert parse_address("grpc://[::1]:8001").authority == "[::1]:8001"
    assert str(parse_address("grpc://[::1]:8001")) == "grpc://[::1]:8001"


@pytest.mark.parametrize(
    ("url", "loopback"), [("localhost", True), ("127.0.0.9:1", True), ("[::1]:1", True), ("10.0.0.1", False)]
)
def test_loopback_is_known(url: str, loopback: bool) -> None:
    assert parse_address(url).is_loopback is loopback


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host:21", "unknown scheme 'ftp'"),
        ("", "no host"),
        ("http://", "no host"),
        ("a host:8000", "no host"),
        ("host:99999", "[Pp]ort"),
        ("host:0", "port 0"),
        ("host:http", "[Pp]ort"),
        ("grpc://host:8001/path", "gRPC takes no path"),
        ("http://user:secret@host", "user names"),
        ("http://host/?a=b", "queries"),
    ],
)
def test_what_names_no_server_is_refused(url: str, words: str) -> None:
    with pytest.raises(AddressError, match=words) as caught:
        parse_address(url)
    assert isinstance(caught.value, (ClientError, ValueError))
    assert "grpc://host:8001" in str(caught.value)
