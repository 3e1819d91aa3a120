"""The few calls of Triton's HTTP API that supervision needs, each on a connection of its own and with a time limit.

Source of the protocol: the KServe v2 extensions in triton-inference-server/server, docs/protocol. A connection a call,
because open ones hold up the server's graceful stop; no tritonclient, because these calls come from several threads.
"""

from __future__ import annotations

import http.client
import json
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from serving.tritonserver import ADMIN_HEADER
from slides.model_metrics import PROBE_ID

CALL_TIMEOUT_S = 5.0
_PENDING = re.compile(
    r'^nv_inference_pending_request_count{model="(?P<model>[^"]*)",version="(?P<version>\d+)"} (?P<count>\d+)',
    re.M,
)


class Refused(Exception):
    """The server answered with an error: `status` and its message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class TritonHttp:
    """One server at `host:port`, asked with the admin token. Safe to use from several threads.

    Every method raises Refused for an answer that is an error, OSError where no answer comes in time.
    """

    def __init__(self, address: str, admin_token: str, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self.headers = {ADMIN_HEADER: admin_token}

    def _call(
        self,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        status, data = _exchange(
            self.address, path, body, {**self.headers, **(headers or {})}, timeout_s or self.timeout_s
        )
        try:
            said = json.loads(data) if data.strip() else {}
        except ValueError:
            said = {"error": data.decode(errors="replace")}
        if status != 200:
            message = said.get("error", "") if isinstance(said, dict) else said
            raise Refused(status, str(message))
        return said

    def health(self, what: str) -> bool:
        """The server's own `live` or `ready`. Raises OSError alone."""
        return _exchange(self.address, f"/v2/health/{what}", None, {}, self.timeout_s)[0] == 200

    def index(self) -> list[dict[str, str]]:
        """All models and versions that the server knows: name, version, state, reason."""
        return list(self._call("/v2/repository/index", b"{}"))

    def config(self, model: str, version: str | None = None) -> dict[str, Any]:
        """The configuration that a model runs with."""
        return dict(self._call(f"/v2/models/{model}{f'/versions/{version}' if version else ''}/config"))

    def successes(self, model: str) -> int:
        """Requests of all versions of a model that were answered since it was loaded."""
        rows = self._call(f"/v2/models/{model}/stats")["model_stats"]
        return sum(int(row["inference_stats"]["success"]["count"]) for row in rows)

    def load(self, model: str, config: Mapping[str, Any] | None = None, *, timeout_s: float) -> None:
        """Load a model, with `config` in place of its file; returns when it is ready."""
        parameters = {"config": json.dumps(config)} if config else {}
        body = json.dumps({"parameters": parameters}).encode()
        self._call(f"/v2/repository/models/{model}/load", body, timeout_s=timeout_s)

    def unload(self, model: str) -> None:
        """Begin to unload a model."""
        self._call(f"/v2/repository/models/{model}/unload", b"{}")

    def infer_bytes(
        self, model: str, name: str, values: Sequence[bytes], shape: Sequence[int], *, timeout_s: float
    ) -> dict[str, list[Any]]:
        """Ask a model with one input of BYTES; returns its outputs by name, as flat lists. Its metrics do not count it."""
        data = b"".join(struct.pack("<I", len(value)) + value for value in values)
        tensor = {"name": name, "shape": list(shape), "datatype": "BYTES",
                  "parameters": {"binary_data_size": len(data)}}  # fmt: skip
        head = json.dumps({"id": PROBE_ID, "inputs": [tensor]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        said = self._call(f"/v2/models/{model}/infer", head + data, headers, timeout_s)
        return {output["name"]: output["data"] for output in said["outputs"]}


def pending_requests(metrics_url: str, *, timeout_s: float) -> dict[tuple[str, str], int]:
    """Requests that wait for an instance, by (model, version). Raises OSError where no answer comes in time."""
    url = urlsplit(metrics_url)
    _, data = _exchange(url.netloc, url.path, None, {}, timeout_s)
    found = _PENDING.finditer(data.decode(errors="replace"))
    return {(row["model"], row["version"]): int(row["count"]) for row in found}


def _exchange(
    address: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
) -> tuple[int, bytes]:
    """Status and body of the answer to one request: a POST where it has a body."""
    connection = http.client.HTTPConnection(address, timeout=timeout_s)
    try:
        method = "GET" if body is None else "POST"
        connection.request(method, path, body, {**headers, "Connection": "close"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"broken answer: {error!r}") from error
    finally:
        connection.close()
