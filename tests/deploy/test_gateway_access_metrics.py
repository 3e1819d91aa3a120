from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from deploy import access_metrics, certificates
from deploy.access_metrics import AccessMetrics, CertificateExpiry, LogFollower, status_of

LINE = {
    "protocol": "http", "route": "infer", "status": "200", "grpc_status": "", "request_s": "0.021", "key": "lab.1",
    "upstream_status": "200", "request_bytes": "120000", "track": "stable",
}  # fmt: skip


def line(**changed: str) -> bytes:
    return json.dumps({**LINE, **changed}).encode()


def value(metrics: AccessMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_lines_are_counted_by_what_they_were() -> None:
    metrics = AccessMetrics()
    metrics.line(line())
    metrics.line(line(protocol="grpc", grpc_status="14", upstream_status=""))
    metrics.line(line(key="", status="401", upstream_status=""))
    metrics.line(line(track="canary_fallback"))
    requests = "clotline_gateway_requests_total"
    http, grpc = (
        {"protocol": protocol, "route": "infer", "track": "stable"} for protocol in ("http", "grpc")
    )
    assert value(metrics, requests, **http, status="200", key="lab.1") == 1
    assert value(metrics, requests, **{**http, "track": "canary_fallback"}, status="200", key="lab.1") == 1
    assert value(metrics, requests, **grpc, status="503", key="lab.1") == 1
    assert value(metrics, requests, **http, status="401", key="none") == 1
    assert value(metrics, "clotline_gateway_request_bytes_total", key="lab.1") == 360_000
    bucket = "clotline_gateway_request_duration_seconds_bucket"
    assert value(metrics, bucket, **http, le="0.02") == 0
    assert value(metrics, bucket, **http, le="0.03") == 1
    assert value(metrics, bucket, **grpc, le="+Inf") == 0  # refused: no duration


@pytest.mark.parametrize(
    "broken",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", line(status="x"), line(status="7"), line(protocol="smtp"), line(track="mine"),
     line(request_s="nan"), line(request_bytes="-1"), json.dumps({"status": "200"}).encode()],
)  # fmt: skip
def test_a_broken_line_is_counted_and_no_more(broken: bytes) -> None:
    metrics = AccessMetrics()
    before = generate_latest(metrics.registry).count(b"clotline_gateway_requests_total{")
    metrics.line(broken)
    assert value(metrics, "clotline_gateway_log_lines_broken_total") == 1
    assert generate_latest(metrics.registry).count(b"clotline_gateway_requests_total{") == before


def test_labels_stay_few_whatever_the_log_says() -> None:
    metrics = AccessMetrics()
    for number in range(3000):
        metrics.line(line(key=f"k{number}", route=f"r{number}"))
    text = generate_latest(metrics.registry).decode()
    assert text.count("clotline_gateway_request_bytes_total{") == 1001
    assert 'route="r' not in text


@pytest.mark.parametrize(
    ("http", "grpc", "expected"),
    [(200, "", 200), (200, "0", 200), (200, "3", 400), (200, "16", 401), (200, "8", 429), (200, "77", 500), (499, "", 499)],
)  # fmt: skip
def test_statuses_of_grpc_become_those_of_http(http: int, grpc: str, expected: int) -> None:
    assert status_of(http, grpc) == expected


def test_the_log_is_followed_through_rotation_and_truncation(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    log.write_bytes(b"old\n")
    follower = LogFollower(log)
    assert list(follower.lines()) == []
    with log.open("ab") as file:
        file.write(b"one\ntw")
        file.flush()
        assert list(follower.lines()) == [b"one"]
        file.write(b"o\n")
    assert list(follower.lines()) == [b"two"]
    log.rename(tmp_path / "access.log.1")
    assert list(follower.lines()) == []
    with (tmp_path / "access.log.1").open("ab") as file:
        file.write(b"late\n")  # nginx writes there until it reopens
    log.write_bytes(b"new\n")
    assert list(follower.lines()) == [b"late", b"new"]
    log.write_bytes(b"c\n")
    assert list(follower.lines()) == [b"c"]
    follower.close()


def test_lines_that_come_to_a_renamed_log_are_read_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nginx' master makes the new file; each worker writes to the old one until it is told, and then what it had gathered."""
    log, old = tmp_path / "access.log", tmp_path / "access.log.1"
    log.write_bytes(b"")
    follower = LogFollower(log)
    worker = log.open("ab", buffering=0)
    log.rename(old)
    log.write_bytes(b"new\n")
    assert list(follower.lines()) == [b"new"]
    worker.write(b"late\n")
    assert list(follower.lines()) == [b"late"]
    monkeypatch.setattr(access_metrics, "WRITERS_S", 0.0)
    log.rename(tmp_path / "access.log.2")
    log.write_bytes(b"newer\n")
    worker.write(b"later\n")
    assert list(follower.lines()) == [b"later", b"newer"]
    worker.write(b"of the one before\n")
    assert list(follower.lines()) == []
    worker.close()
    follower.close()


def test_a_log_that_comes_later_is_read_from_its_start(tmp_path: Path) -> None:
    follower = LogFollower(tmp_path / "access.log")
    assert list(follower.lines()) == []
    (tmp_path / "access.log").write_bytes(b"first\n")
    assert list(follower.lines()) == [b"first"]
    follower.close()


def test_expiry_of_certificates_is_told_and_an_unreadable_one_has_expired(tmp_path: Path) -> None:
    files = certificates.make(tmp_path / "tls", days=7)
    metrics = AccessMetrics()
    metrics.registry.register(CertificateExpiry([files.certificate, tmp_path / "none.pem"]))
    name = "clotline_certificate_expiry_timestamp_seconds"
    expiry = value(metrics, name, certificate=str(files.certificate))
    assert expiry == certificates.expiry_unix_s(files.certificate)
    certificates.renew(tmp_path / "tls", days=30)
    assert value(metrics, name, certificate=str(files.certificate)) - expiry > 20 * 86_400
    assert value(metrics, name, certificate=str(tmp_path / "none.pem")) == 0
