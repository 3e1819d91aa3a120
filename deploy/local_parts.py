"""The parts of a stack on this machine, as data: what is started, in which order, and how it is known to be ready."""

from __future__ import annotations

import http.client
import json
import ssl
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deploy.whole_file import write_whole

ANSWER_S = 2.0
LONGEST_REASON = 300


@dataclass(frozen=True)
class Part:
    """One process of a stack.

    Attributes:
        name: of its log and in `status`.
        argv: command line; a part whose argv, env or directory has changed is started anew.
        log: file that its standard output and error are appended to.
        directory: it works in.
        ready_url: `http://` or `https://` address that answers 200 once it is ready.
        ca: PEM file that an `https://` address is checked with.
        address: what `status` shows.
        env: added to the supervisor's environment.
        files_sha256: of the files that it reads; if only these have changed, it is sent `reload_signal`.
        reload_signal: makes it read its files again, e.g. `SIGHUP`.
        stop_signal: ends it gracefully, within `stop_s`; then its process group is killed.
        ready_s: seconds that its start may take.
        own_log: file that it opens itself; when it is long it is renamed, and the part is sent `reopen_signal`.
    """

    name: str
    argv: tuple[str, ...]
    log: str
    directory: str
    ready_url: str
    ca: str = ""
    address: str = ""
    env: dict[str, str] = field(default_factory=dict)
    files_sha256: str = ""
    reload_signal: str = ""
    stop_signal: str = "SIGTERM"
    stop_s: float = 10.0
    ready_s: float = 30.0
    own_log: str = ""
    reopen_signal: str = "SIGUSR1"

    def same_process(self, other: Part) -> bool:
        """True if a process of `other` will do for this one, once it has read its files again."""
        return (self.argv, self.env, self.directory) == (other.argv, other.env, other.directory) and (
            self.files_sha256 == other.files_sha256 or bool(self.reload_signal)
        )


@dataclass(frozen=True)
class Plan:
    """What a supervisor runs: its parts in the order of their start. `generation` counts the plans of one supervisor."""

    generation: int
    parts: tuple[Part, ...]

    def write(self, path: Path) -> None:
        """Write it whole, for its owner alone."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Plan:
        """What `write` wrote. Raises OSError or ValueError."""
        told = json.loads(path.read_text())
        parts = []
        for part in told["parts"]:
            parts.append(Part(**{**part, "argv": tuple(part["argv"])}))
        return cls(told["generation"], tuple(parts))


def write_json(path: Path, told: Any) -> None:
    """Write a JSON file whole, readable by its owner only."""
    write_whole(path, json.dumps(told, indent=1), 0o600)


def fetch(url: str, *, ca: str = "", timeout_s: float = ANSWER_S) -> tuple[int, bytes]:
    """Status and body of a GET. Raises OSError where there is no answer, ssl.SSLError among them."""
    address = urlsplit(url)
    host, port = address.hostname or "", address.port
    if address.scheme == "https":
        context = ssl.create_default_context(cafile=ca or None)
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=timeout_s, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", (address.path or "/") + (f"?{address.query}" if address.query else ""))
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"broken answer: {error!r}") from error
    finally:
        connection.close()


def why_not_ready(part: Part) -> str:
    """Empty if the part is ready, else what its address says."""
    try:
        status, body = fetch(part.ready_url, ca=part.ca)
    except (OSError, ValueError) as error:
        return f"{part.ready_url}: {error}"
    if status == http.client.OK:
        return ""
    try:
        told = str(json.loads(body)["reason"])
    except (ValueError, KeyError, TypeError):
        told = " ".join(body.decode(errors="replace").split())
    return f"{part.ready_url} answers {status}: {told[:LONGEST_REASON]}"
