"""What is known of a server's health, `GET /live` and `GET /ready` for Kubernetes, and `GET /metrics` for Prometheus.

`/live` answers 200 while the supervisor itself works, 503 once it does not: the supervisor restarts a dead server, so
only its own death is a reason to start the container again. `/ready` answers 200 while every public model has been
proven lately and no stub is missing, else 503. Both bodies are JSON and say what is wrong and since when. `/metrics` is
text of `serving/supervisor_metrics.py`.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any, ClassVar

HEARTBEAT_S = 60.0
REQUEST_TIMEOUT_S = 5.0
ASK_TIMEOUT_S = 2.0
TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"


def now_utc() -> str:
    """ISO 8601, seconds, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass
class Condition:
    """Ready or not, since when, and why not."""

    ready: bool
    reason: str = ""
    since: str = field(default_factory=now_utc)

    def as_json(self) -> dict[str, Any]:
        """For the body of `/ready`."""
        told = {"ready": self.ready, "since": self.since}
        return told if self.ready else {**told, "reason": self.reason}


class Health:
    """Conditions of the server, of each public model, and of models that lack a stub. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server = Condition(False, "starting")
        self._public: dict[str, Condition] = {}
        self._broken: dict[str, Condition] = {}
        self._overall = Condition(False, "starting")
        self._beat = time.monotonic()
        self.restarts = 0
        self.replacements: dict[str, int] = {}

    def set_server(self, ready: bool, reason: str = "") -> None:
        """The server as a whole: False while it starts, restarts or stops, and what was known of its models is void."""
        with self._lock:
            if not ready:
                self._public, self._broken = {}, {}
            self._server = self._changed(self._server, ready, reason)
            self._sum_up()

    def set_models(self, reasons: Mapping[str, str | None]) -> None:
        """The public models: None for one that was proven lately, else what is wrong."""
        with self._lock:
            unknown = Condition(False, "")
            self._public = {
                name: self._changed(self._public.get(name, unknown), reason is None, reason or "")
                for name, reason in reasons.items()
            }
            self._sum_up()

    def set_broken(self, reasons: Mapping[str, str]) -> None:
        """Models of which a stub is missing, or that are being replaced."""
        with self._lock:
            whole = Condition(True)
            self._broken = {
                name: self._changed(self._broken.get(name, whole), False, reason)
                for name, reason in reasons.items()
            }
            self._sum_up()

    @staticmethod
    def _changed(before: Condition, ready: bool, reason: str) -> Condition:
        if before.ready == ready:
            return Condition(ready, reason, before.since)
        return Condition(ready, reason)

    def _sum_up(self) -> None:
        wrong = [] if self._server.ready else [self._server.reason]
        wrong += [
            f"{name}: {c.reason}" for name, c in {**self._public, **self._broken}.items() if not c.ready
        ]
        self._overall = self._changed(self._overall, not wrong, "; ".join(wrong))

    def beat(self) -> None:
        """The supervisor has gone round once more."""
        self._beat = time.monotonic()

    @property
    def ready(self) -> bool:
        """What `/ready` says."""
        return self._overall.ready

    @property
    def reason(self) -> str:
        """Why it is not ready; empty if it is."""
        return self._overall.reason

    def live(self) -> tuple[int, dict[str, Any]]:
        """Status and body of `/live`."""
        silent_s = time.monotonic() - self._beat
        live = silent_s < HEARTBEAT_S
        return (200 if live else 503), {"live": live, "supervisor_silent_s": round(silent_s, 1)}

    def readiness(self) -> tuple[int, dict[str, Any]]:
        """Status and body of `/ready`."""
        with self._lock:
            body = self._overall.as_json()
            body["server"] = self._server.as_json()
            body["models"] = {name: condition.as_json() for name, condition in self._public.items()}
            body["stubs_missing"] = {name: condition.as_json() for name, condition in self._broken.items()}
            body["restarts"] = {"server": self.restarts, "models": dict(self.replacements)}
            return (200 if self._overall.ready else 503), body


def ask_ready(address: str) -> tuple[int, dict[str, Any]]:
    """Status and body of GET /ready at `http://host:port`. Raises OSError or ValueError if there is no answer in 2 s."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=ASK_TIMEOUT_S)
    try:
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        return answer.status, dict(json.loads(answer.read()))
    except http.client.HTTPException as error:
        raise ConnectionError(f"broken answer: {error!r}") from error
    finally:
        connection.close()


class HealthServer:
    """Serves one Health on an address; port 0 takes a free one. Raises OSError if the address cannot be used.

    Args:
        metrics: gives the body of `/metrics`.
    """

    def __init__(
        self, health: Health, host: str, port: int, metrics: Callable[[], str] | None = None
    ) -> None:
        class Handler(_Handler):
            answers: ClassVar = {"/live": health.live, "/ready": health.readiness}
            if metrics is not None:
                answers["/metrics"] = lambda: (200, metrics())

        class Server(ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        self._server = Server((host, port), Handler)
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    answers: ClassVar[dict[str, Callable[[], tuple[int, dict[str, Any] | str]]]] = {}
    timeout = REQUEST_TIMEOUT_S
    server_version = "clotline"
    sys_version = ""

    def do_GET(self) -> None:
        """`/live`, `/ready` or `/metrics`."""
        answer = self.answers.get(self.path.partition("?")[0])
        status, body = answer() if answer else (404, {"error": f"GET {', '.join(self.answers)}"})
        as_text = isinstance(body, str)
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", TEXT_FORMAT if as_text else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every few seconds: they are not logged."""
