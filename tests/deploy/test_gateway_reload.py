"""Keys, certificates and settings that change while requests are under way; mutual TLS; settings that are wrong."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients import SlideClient
from clients.errors import ClientError, ServerUnreachable
from deploy import certificates
from deploy.access_metrics import AccessMetrics
from deploy.benchmarks.guarded import Target, free_port, running
from deploy.benchmarks.load import Connection
from deploy.errors import GatewayError, UsageError
from deploy.gateway import (
    CHECKOUT,
    TEMPLATES,
    GatewaySettings,
    reload,
    remove_scratch,
    render,
    reopen_logs,
    running_pid,
)
from deploy.gateway_reload import reload_gateways
from deploy.keys import Limits
from perf.http_load import infer_request
from tests.deploy.gateway_stack import Stack, gateway_stack, jpeg_tiles, needs_nginx

pytestmark = needs_nginx


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with gateway_stack(tmp_path_factory.mktemp("reload"), in_flight=32) as running_stack:
        yield running_stack


class Load:
    """Clients over HTTP and gRPC that ask without a pause, with the key of the moment."""

    def __init__(self, stack: Stack) -> None:
        self.stack, self.key = stack, stack.keys["lab"]
        self.failed: list[str] = []
        self.answered = {"http": 0, "grpc": 0}
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=ask) for ask in (self._http, self._http, self._grpc, self._grpc)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _http(self) -> None:
        target = Target("127.0.0.1", self.stack.settings.listen_port, "", self.stack.ca)
        connection = Connection(target)
        request = infer_request("tile_classifier", jpeg_tiles()[0], ("probabilities",), "localhost")
        while not self._stop.is_set():
            try:
                status, answer, _ = connection.ask(
                    dataclasses.replace(target, key=self.key).with_key(request)
                )
                if status != 200:
                    self.failed.append(f"{status} {answer[-100:]!r}")
            except OSError as error:
                self.failed.append(repr(error))
            self.answered["http"] += 1
        connection.close()

    def _grpc(self) -> None:
        while not self._stop.is_set():
            url = f"grpcs://{self.stack.authority}"
            with SlideClient(url, api_key=self.key, ca=self.stack.ca, retries=0, concurrency=1) as client:
                try:
                    for _ in range(20):
                        client.classify([jpeg_tiles()[0]])
                        self.answered["grpc"] += 1
                except ClientError as error:
                    self.failed.append(str(error))


def test_keys_and_certificates_change_under_load_and_nothing_fails(stack: Stack) -> None:
    def answered(key: str) -> int:
        return stack.ask("/v2", key=key).status

    serials = []
    with Load(stack) as load:
        for number in range(3):
            rotated = stack.store.rotate("lab", 60)
            guest = stack.store.add(f"guest-{number}", Limits())
            assert answered(guest) == 401
            reload(stack.conf)
            load.key = rotated
            assert answered(guest) == 200
            stack.store.revoke(f"guest-{number}")
            certificates.renew(stack.state / "tls")
            assert reload_gateways(stack.state) == [str(stack.conf)]
            assert answered(guest) == 401
            with stack.connect() as connection:
                serials.append((connection.getpeercert() or {})["serialNumber"])
    assert load.failed == []
    assert min(load.answered.values()) > 20
    assert len(set(serials)) == 3
    stack.keys["lab"] = load.key


def test_an_old_key_ends_with_its_grace_by_itself(stack: Stack) -> None:
    old = stack.store.add("passing", Limits())
    new = stack.store.rotate("passing", 3)
    end_s = time.time() + 3
    reload(stack.conf)
    statuses = []
    while time.time() < end_s + 1.5:
        statuses.append((time.time(), stack.ask("/v2", key=old).status))
        time.sleep(0.1)
    assert {status for at_s, status in statuses if at_s > end_s + 1.1} == {401}
    assert 200 in {status for at_s, status in statuses if at_s < end_s - 0.5} or statuses[0][0] > end_s - 1
    assert stack.ask("/v2", key=new).status == 200


def test_a_broken_file_of_keys_leaves_the_old_one_in_force(stack: Stack) -> None:
    good = stack.store.nginx_file.read_text()
    try:
        stack.store.nginx_file.write_text("map $presented_key {")
        with pytest.raises(GatewayError, match=r"keys\.conf"):
            reload(stack.conf)
        assert stack.ask("/v2", key=stack.keys["lab"]).status == 200
    finally:
        stack.store.nginx_file.write_text(good)


def test_the_log_can_be_rotated(stack: Stack) -> None:
    log = stack.settings.directory / "access.log"
    log.rename(log.with_suffix(".1"))
    reopen_logs(stack.conf)
    deadline_s = time.monotonic() + 20
    while not log.exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    stack.ask("/v2", key=stack.keys["lab"], headers="X-Request-ID: after-rotation\r\n")
    assert "after-rotation" in [line["request_id"] for line in stack.log()]


def test_every_line_that_nginx_writes_is_one_for_the_metrics(stack: Stack) -> None:
    for request in (
        b"\x16\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: \xff\"'\\\r\n\r\n",
        b'GET /\xfe"\x01 HTTP/1.1\r\nHost: a\r\n\r\n',
    ):
        stack.exchange(request)
    stack.log()
    metrics = AccessMetrics()
    for line in stack.log_text().splitlines():
        metrics.line(line.encode())
    assert metrics.registry.get_sample_value("clotline_gateway_log_lines_broken_total") == 0


def test_with_mutual_tls_a_key_is_not_enough(stack: Stack) -> None:
    tls = stack.state / "tls"
    pem, key_file = certificates.make_client(tls, "lab")
    settings = dataclasses.replace(
        stack.settings, directory=stack.state / "mutual", listen_port=free_port(), client_ca=tls / "ca.pem"
    )
    key = stack.keys["lab"]
    with running(settings):
        for scheme in ("https", "grpcs"):
            url = f"{scheme}://localhost:{settings.listen_port}"
            shown = {"certificate": pem, "certificate_key": key_file}
            with SlideClient(url, api_key=key, ca=stack.ca, **shown) as client:
                assert client.classify_tiles(jpeg_tiles()[:1]).shape == (1, 2)
        url = f"https://localhost:{settings.listen_port}"
        with SlideClient(url, api_key=key, ca=stack.ca, retries=0) as client, pytest.raises(ClientError):
            client.classify_tiles(jpeg_tiles()[:1])
    assert running_pid(settings.directory / "nginx.conf") is None


def test_an_unknown_authority_is_told_as_such(stack: Stack) -> None:
    for scheme in ("https", "grpcs"):
        client = SlideClient(f"{scheme}://{stack.authority}", api_key=stack.keys["lab"], retries=0)
        with client, pytest.raises(ServerUnreachable, match="--ca FILE"):
            client.classify_tiles(jpeg_tiles()[:1])


def test_impossible_settings_are_told_and_nothing_is_written(tmp_path: Path) -> None:
    settings = GatewaySettings(
        directory=tmp_path / "gateway", keys_file=tmp_path / 'k"; evil', certificate=tmp_path / "c",
        certificate_key=tmp_path / "k", in_flight_batch=0, server_name="a;b",
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"CLOTLINE_SERVER_NAME.*CLOTLINE_KEYS.*in_flight_batch"):
        render(settings)
    assert not (tmp_path / "gateway").exists()


def test_every_variable_of_the_templates_is_documented() -> None:
    documented = (CHECKOUT / "docs" / "gateway.md").read_text()
    settings = GatewaySettings(Path("d"), Path("k"), Path("c"), Path("ck"))
    missing = [name for name in settings.variables() if name not in documented]
    assert missing == []


def test_templates_and_settings_know_the_same_variables(tmp_path: Path) -> None:
    settings = GatewaySettings(tmp_path / "g", tmp_path / "k", tmp_path / "c", tmp_path / "ck")
    used = {
        name
        for path in TEMPLATES.rglob("*.template")
        for name in re.findall(r"\$\{(\w+)\}", path.read_text())
    }
    assert used == set(settings.variables())
    render(settings)
    remove_scratch(settings.directory)
    rendered = [path.read_text() for path in (tmp_path / "g").rglob("*.conf")]
    assert len(rendered) == len(list(TEMPLATES.rglob("*.template")))
    assert not any(re.search(r"\$\{CLOTLINE_\w", text) for text in rendered)
    assert any("$clotline_request_id" in text for text in rendered)  # nginx's own variables are left alone
