"""A running tritonserver, as a release needs it: model control with the admin token, the index, and inference.

Models are loaded over gRPC. A load that is asked for over HTTP holds one of the frontend's few threads until it is done, and
with it the inference requests of every client whose connection that thread serves; in the gRPC frontend it holds the thread of
the calls that are no inference. Where gRPC wants certificates (`--grpc-tls-cert`), which belong to clients, HTTP it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from serving.instances import InstanceState
from serving.processes import memory_bytes, processes_of
from serving.releases.errors import ServerRefused
from serving.tritonserver import ADMIN_HEADER, ADMIN_METADATA, composed_counting_backends
from slides.model_metrics import PROBE_ID

POLL_S = 0.02
READY = "READY"


class Server:
    """One server; use it as a context manager, from one thread.

    Args:
        state: what its state file says.
        timeout_s: a load or an inference that takes longer has failed.
    """

    def __init__(self, state: InstanceState, *, timeout_s: float) -> None:
        self.name = state.name
        self.timeout_s = timeout_s
        self.counting_backends = composed_counting_backends(Path(state.directory))
        self._instance_id = state.instance_id
        self._over_grpc = state.grpc_tls == "off"
        self._limit: dict[str, Any] = {}
        if self._over_grpc:
            self._api: Any = tritonclient.grpc
            self._client = tritonclient.grpc.InferenceServerClient(state.grpc)
            self._admin = {ADMIN_METADATA: state.admin_token}
            self._limit = {"client_timeout": timeout_s}
        else:
            self._api = tritonclient.http
            self._client = tritonclient.http.InferenceServerClient(state.http, network_timeout=timeout_s)
            self._admin = {ADMIN_HEADER: state.admin_token}

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()  # an open connection holds up the server's graceful stop

    def reachable(self) -> bool:
        """True if it answers."""
        try:
            return bool(self._client.is_server_live(**self._limit))
        except (OSError, InferenceServerException):
            return False

    def load(self, model: str) -> None:
        """Load a model, and what an ensemble is made of; raises ServerRefused with Triton's reason."""
        self._control(f"load {model}", self._client.load_model, model)

    def unload(self, model: str) -> None:
        """Unload a model; one that is not loaded is fine."""
        self._control(f"unload {model}", self._client.unload_model, model)

    def versions(self) -> dict[str, dict[int, tuple[str, str]]]:
        """Model -> version -> (state, reason), of all versions that are or were loaded."""
        as_json = {"as_json": True} if self._over_grpc else {}
        told = self._control("list the models", self._client.get_model_repository_index, **as_json)
        rows = told.get("models", []) if self._over_grpc else told
        found: dict[str, dict[int, tuple[str, str]]] = {}
        for row in rows:
            versions = found.setdefault(row["name"], {})
            if row.get("version"):
                versions[int(row["version"])] = (row.get("state", ""), row.get("reason", ""))
        return found

    def ready_versions(self, model: str) -> set[int]:
        """Versions of a model that answer."""
        return {v for v, (state, _) in self.versions().get(model, {}).items() if state == READY}

    def wait_unloaded(self, wanted: Mapping[str, int | None], timeout_s: float) -> float | None:
        """Seconds until the versions (None: all of a model) are unloaded, which they are after their last answer.

        None if that took more than `timeout_s`.
        """
        started = time.monotonic()
        while True:
            found = self.versions()
            busy = [
                name
                for name, only in wanted.items()
                for version, (state, _) in found.get(name, {}).items()
                if only in (None, version) and state not in ("UNAVAILABLE", "")
            ]
            waited = time.monotonic() - started
            if not busy:
                return waited
            if waited > timeout_s:
                return None
            time.sleep(POLL_S)

    def infer(self, model: str, inputs: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
        """Ask a model; returns its outputs and the version that answered. The model's metrics do not count it.

        Args:
            model: its name.
            inputs: name -> object array of bytes.
        """
        tensors = []
        for name, array in inputs.items():
            tensor = self._api.InferInput(name, list(array.shape), "BYTES")
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        result = self._ask(
            f"answer as {model}",
            lambda: self._client.infer(model, tensors, request_id=PROBE_ID, **self._limit),
        )
        told = result.get_response()
        if self._over_grpc:
            return {entry.name: result.as_numpy(entry.name) for entry in told.outputs}, int(
                told.model_version
            )
        names = [entry["name"] for entry in told["outputs"]]
        return {name: result.as_numpy(name) for name in names}, int(told["model_version"])

    def memory_mb(self) -> float | None:
        """Proportional memory of all its processes, MB; None where it cannot be read."""
        found = memory_bytes(processes_of(self._instance_id))
        return found and round(found / 2**20, 1)

    def _control(self, what: str, call: Any, *arguments: str, **options: Any) -> Any:
        return self._ask(what, lambda: call(*arguments, headers=self._admin, **options, **self._limit))

    def _ask(self, what: str, call: Any) -> Any:
        try:
            return call()
        except InferenceServerException as error:
            raise ServerRefused(f"server {self.name} did not {what}: {_told(error)}") from error
        except OSError as error:
            reason = error or f"no answer within {self.timeout_s:g} s"
            raise ServerRefused(f"server {self.name} did not {what}: {reason}") from error


def _told(error: InferenceServerException) -> str:
    """Triton's reason without the Python frames that its stub adds."""
    reason = str(error.message() or error).split("\n\nAt:\n")[0].strip()
    return reason.removeprefix("load failed for model ").replace("Internal: TritonModelException: ", "")
