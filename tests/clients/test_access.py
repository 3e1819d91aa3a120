from __future__ import annotations

import time
from pathlib import Path

import pytest

from clients import SlideClient
from clients.__main__ import main
from clients.access import Access, api_key_from
from clients.address import parse_address
from clients.connections import Patience, call_with_patience
from clients.errors import AccessError, ServerBusy
from clients.transport import Transport, error_of, open_transport

KEY = "clk_" + 64 * "a"


@pytest.mark.parametrize("url", ["https://host", "grpcs://host", "localhost:8000", "grpc://127.0.0.1:8001"])
def test_a_key_goes_over_tls_or_to_this_machine(url: str) -> None:
    Access(KEY).check(parse_address(url))


@pytest.mark.parametrize("url", ["host:8000", "http://10.0.0.1", "grpc://host"])
def test_a_key_is_not_sent_where_others_could_read_it(url: str) -> None:
    with pytest.raises(AccessError, match="https://") as caught:
        SlideClient(url, api_key=KEY)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", ["", "short", "with blank " + KEY, KEY + "\r\nX: y", 600 * "a", "clé" + KEY])
def test_what_cannot_be_a_key_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(AccessError) as caught:
        Access(key).check(parse_address("https://host"))
    assert key == "" or key not in str(caught.value)
    assert KEY not in repr(Access(KEY))


def test_the_key_comes_from_the_file_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    monkeypatch.delenv("CLOTLINE_API_KEY", raising=False)
    assert api_key_from(None) is None
    monkeypatch.setenv("CLOTLINE_API_KEY", "other-key")
    assert api_key_from(None) == "other-key"
    assert api_key_from(file) == KEY
    file.write_text("\n")
    for wrong in (file, tmp_path / "none"):
        with pytest.raises(AccessError, match=wrong.name):
            api_key_from(wrong)


def test_files_of_tls_that_cannot_be_used_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    for options in (
        ["--ca", str(broken)],
        ["--certificate", str(broken)],
        ["--ca", str(tmp_path / "none.pem")],
    ):
        assert main(["classify", "tile.jpg", "--url", "https://localhost:1", *options]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert told.count("\n") == 1
    with pytest.raises(AccessError, match="https://"):
        Access(ca=broken).check(parse_address("localhost:8000"))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("429", "too many requests a second for this key; try again in 1 s"),
        ("StatusCode.RESOURCE_EXHAUSTED", "too many requests a second for this key; try again in 1 s"),
        ("StatusCode.UNAVAILABLE", "too many requests in flight; try again in 1 s"),
    ],
)
def test_a_busy_gateway_is_asked_again_when_it_says_so(status: str, message: str) -> None:
    busy = error_of(message, status, model="m", address=parse_address("https://host"))
    assert isinstance(busy, ServerBusy)
    assert busy.retry_after_s == 1
    asked_s: list[float] = []

    def call(_transport: Transport, _timeout_s: float) -> str:
        asked_s.append(time.monotonic())
        if len(asked_s) == 1:
            raise busy
        return "answer"

    transport = open_transport(parse_address("localhost:1"))
    assert call_with_patience(call, transport, Patience(30.0, 1)) == "answer"
    assert asked_s[1] - asked_s[0] >= 1.0
