"""Health as it is summed up and served: one bad part is enough for 503, and `since` stays while a state lasts."""

from __future__ import annotations

import http.client
from collections.abc import Iterator

import pytest

from serving.health import HEARTBEAT_S, Health, HealthServer
from tests.serving.public_model import health as get


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
def url(health: Health) -> Iterator[str]:
    server = HealthServer(health, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.port}"
    server.close()


def test_it_is_not_ready_before_the_first_proof(health: Health, url: str) -> None:
    status, body = get(url)
    assert (status, body["ready"], body["reason"]) == (503, False, "starting")
    health.set_server(True)
    health.set_models({"tile_classifier": "not proven yet"})
    status, body = get(url)
    assert (status, body["reason"]) == (503, "tile_classifier: not proven yet")
    health.set_models({"tile_classifier": None})
    assert get(url)[0] == 200


def test_one_bad_model_or_one_missing_stub_is_enough(health: Health) -> None:
    health.set_server(True)
    health.set_models({"a": None, "b": None})
    since = health.readiness()[1]["models"]["a"]["since"]
    health.set_models({"a": None, "b": "no answer for 7 s"})
    status, body = health.readiness()
    assert status == 503
    assert body["models"]["a"] == {"ready": True, "since": since}
    assert body["models"]["b"]["reason"] == "no answer for 7 s"
    health.set_models({"a": None, "b": None})
    health.set_broken({"tile_preprocess": "a stub of it died"})
    status, body = health.readiness()
    assert (status, body["reason"]) == (503, "tile_preprocess: a stub of it died")
    health.set_broken({})
    assert health.ready


def test_a_restart_voids_what_was_known(health: Health) -> None:
    health.set_server(True)
    health.set_models({"a": None})
    health.set_server(False, "tritonserver ended")
    health.set_server(True)
    assert health.readiness()[1]["models"] == {}


def test_live_follows_the_supervisor(health: Health, url: str) -> None:
    assert get(url, "/live")[0] == 200
    health._beat -= HEARTBEAT_S + 1
    status, body = get(url, "/live")
    assert (status, body["live"]) == (503, False)
    health.beat()
    assert get(url, "/live")[0] == 200


def test_other_paths_and_head(url: str) -> None:
    assert get(url, "/metrics")[0] == 404
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
    connection.request("HEAD", "/ready")
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (503, b"")
    connection.close()
