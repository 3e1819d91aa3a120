"""Metrics of the gateway, from its access log: followed through rotation and truncation, served for Prometheus.

    clotline_gateway_requests_total{protocol,route,status,key,track}
    clotline_gateway_request_duration_seconds{protocol,route,track}  accepted requests, as nginx saw them
    clotline_gateway_request_bytes_total{key}
    clotline_gateway_log_lines_broken_total
    clotline_certificate_expiry_timestamp_seconds{certificate}

`status` is an HTTP status for both protocols; a status of gRPC becomes the HTTP status of the same meaning, so that one
expression finds the errors of both. Every label has a bounded number of values: keys come from the gateway's own file of
keys (the log says nothing that a client made up), other values from fixed lists.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from deploy.certificates import expiry_unix_s
from deploy.errors import CertificateError

BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROUTES = ("infer", "metadata", "health", "other")
PROTOCOLS = ("http", "grpc")
TRACKS = ("stable", "canary", "canary_fallback")
"""Who answered: the server, a candidate, or the server because the candidate failed (docs/gateway.md, Canary)."""
NO_KEY = "none"
WRITERS_S = 10.0
_MOST_KEYS = 1000
_MOST_LINE_BYTES = 64 << 10
_CHUNK_BYTES = 1 << 18
# grpc/statuscodes.md, and the HTTP status of the same meaning (google.rpc.Code). 12, UNIMPLEMENTED, is the asker's mistake.
HTTP_STATUS_OF_GRPC = {
    0: 200, 1: 499, 2: 500, 3: 400, 4: 504, 5: 404, 6: 409, 7: 403, 8: 429,
    9: 400, 10: 409, 11: 400, 12: 404, 13: 500, 14: 503, 15: 500, 16: 401,
}  # fmt: skip


class AccessMetrics:
    """Counts lines of the access log (`line`), into a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "clotline_gateway_requests", "Requests that the gateway answered.",
            ["protocol", "route", "status", "key", "track"], registry=self.registry,
        )  # fmt: skip
        self._duration = Histogram(
            "clotline_gateway_request_duration_seconds",
            "From the first byte of an accepted request to the last of its answer.",
            ["protocol", "route", "track"],
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self._bytes = Counter(
            "clotline_gateway_request_bytes", "Bytes of requests.", ["key"], registry=self.registry
        )
        self._broken = Counter(
            "clotline_gateway_log_lines_broken",
            "Lines of the access log that are none.",
            registry=self.registry,
        )
        self._keys: set[str] = set()
        for protocol in PROTOCOLS:  # rates work from the first request on
            self._duration.labels(protocol, "infer", TRACKS[0])
            self._requests.labels(protocol, "infer", "200", NO_KEY, TRACKS[0])

    def line(self, text: bytes) -> None:
        """Count one line; a broken one is counted as such."""
        try:
            told = json.loads(text)
            protocol, route = told["protocol"], told["route"]
            status = status_of(int(told["status"]), told["grpc_status"])
            duration_s, size_bytes = float(told["request_s"]), int(told["request_bytes"])
            key, accepted, track = self._key(told["key"]), bool(told["upstream_status"]), told["track"]
            if (
                protocol not in PROTOCOLS
                or track not in TRACKS
                or not isinstance(key, str)
                or not duration_s >= 0
                or size_bytes < 0
            ):
                raise ValueError("a value that nginx does not write")
        except (ValueError, KeyError, TypeError):
            self._broken.inc()
            return
        route = route if route in ROUTES else "other"
        self._requests.labels(protocol, route, str(status), key, track).inc()
        self._bytes.labels(key).inc(size_bytes)
        if accepted and status == 200:
            self._duration.labels(protocol, route, track).observe(duration_s)

    def _key(self, key_id: str) -> str:
        if not key_id:
            return NO_KEY
        if key_id not in self._keys:
            if len(self._keys) >= _MOST_KEYS:
                return "other"
            self._keys.add(key_id)
        return key_id


def status_of(http_status: int, grpc_status: str) -> int:
    """The HTTP status that stands for an answer.

    An answer of gRPC that has no status of its own is a broken one: 499 if the client left, else 500.
    """
    if not 100 <= http_status <= 599:
        raise ValueError(f"status {http_status}")
    if grpc_status.isdigit():
        return HTTP_STATUS_OF_GRPC.get(int(grpc_status), 500)
    return http_status


class _Tail:
    """A file that is open, and the beginning of a line that was read from its end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._rest = b""

    def lines(self) -> Iterator[bytes]:
        """The whole lines that were written since the last call."""
        if self.file.tell() > os.fstat(self.file.fileno()).st_size:
            self.file.seek(0)  # cut
            self._rest = b""
        while chunk := self.file.read(_CHUNK_BYTES):
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            yield from (line for line in whole if line)
            if len(self._rest) > _MOST_LINE_BYTES:
                yield self._rest
                self._rest = b""

    def is_at(self, path: Path) -> bool:
        """False if another file is there now."""
        try:
            now = path.stat()
        except OSError:
            return True  # renamed, and not made anew yet
        ours = os.fstat(self.file.fileno())
        return (now.st_dev, now.st_ino) == (ours.st_dev, ours.st_ino)


class LogFollower:
    """The new lines of a file that grows, is renamed and made anew, or is cut. Begins at its end, or at the start of a file that
    is not there yet. A file that was renamed is read for WRITERS_S more: nginx' master makes the new one before all of its
    workers have brought the last lines to the old one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._now = self._open()
        self._before: _Tail | None = None
        self._before_until_s = 0.0
        if self._now:
            self._now.file.seek(0, os.SEEK_END)

    def lines(self) -> Iterator[bytes]:
        """The lines that were written since the last call."""
        if self._before:
            yield from self._before.lines()
            if time.monotonic() > self._before_until_s:
                self._before.file.close()
                self._before = None
        self._now = self._now or self._open()
        if self._now is None:
            return
        yield from self._now.lines()
        if not self._now.is_at(self._path):
            yield from self._now.lines()  # what was written to it before it was renamed
            if self._before:
                self._before.file.close()
            self._before, self._before_until_s = self._now, time.monotonic() + WRITERS_S
            self._now = self._open()
            if self._now:
                yield from self._now.lines()

    def close(self) -> None:
        """Close what is open; a line without its end is given up."""
        for tail in (self._before, self._now):
            if tail:
                tail.file.close()
        self._before = self._now = None

    def _open(self) -> _Tail | None:
        try:
            return _Tail(self._path.open("rb"))
        except OSError:
            return None


class CertificateExpiry(Collector):
    """When certificates expire, read from their files at each scrape; one that cannot be read expired in 1970."""

    def __init__(self, certificates: Sequence[Path]) -> None:
        self._certificates = certificates

    def collect(self) -> Iterator[Any]:
        """One gauge with a sample a certificate, labelled by its file's path."""
        gauge = GaugeMetricFamily(
            "clotline_certificate_expiry_timestamp_seconds",
            "When a certificate expires.",
            labels=["certificate"],
        )
        for path in self._certificates:
            try:
                expiry_s = expiry_unix_s(path)
            except CertificateError:
                expiry_s = 0.0
            gauge.add_metric([str(path)], expiry_s)
        yield gauge


def follow(
    metrics: AccessMetrics, follower: LogFollower, stop: threading.Event, every_s: float = 0.5
) -> None:
    """Count what is written to the log until `stop` is set."""
    while not stop.wait(every_s):
        for line in follower.lines():
            metrics.line(line)
