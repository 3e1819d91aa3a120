"""What a server must have done before it is called ready.

1. One array of every dtype goes through Triton's Python stub and comes back equal.
2. Every model of the repository is ready.
3. A synthetic tile or bag goes through every public model and comes back as probabilities (serving/synthetic.py).
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from serving import synthetic
from serving.errors import ProofError, StartError
from serving.triton_http import Refused, TritonHttp

ROUNDTRIP_MODEL = "dtype_roundtrip"
DTYPES: dict[str, Any] = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "FP16": np.float16, "FP32": np.float32, "FP64": np.float64, "BYTES": np.object_,
}  # fmt: skip
POLL_S = 0.05
REQUEST_TIMEOUT_S = 30.0
NUMPY_CURE = "Triton's Python stub needs numpy<2: run `python -m serving install --force`."


class Prover:
    """One started server, asked over HTTP. `alive` says whether its process still runs, raising StartError if not."""

    def __init__(
        self, url: str, admin_token: str, alive: Callable[[], None], log: Path, proof_report: Path
    ) -> None:
        self.client = triton.InferenceServerClient(
            url, connection_timeout=REQUEST_TIMEOUT_S, network_timeout=REQUEST_TIMEOUT_S
        )
        self.api = TritonHttp(url, admin_token)
        self.alive = alive
        self.log = log
        self.proof_report = proof_report

    def prove(self, deadline_s: float, *, again: bool = False) -> list[str]:
        """Run all proofs; returns the names of the ready models.

        Args:
            deadline_s: on the clock of time.monotonic().
            again: a restart, where every second counts: the model of the first proof is unloaded (1 s) afterwards.

        Raises StartError if a model does not load, ProofError if one answers wrongly.
        """
        try:
            return self._prove(deadline_s, again)
        except (OSError, Refused) as error:
            self.alive()
            raise StartError(
                f"tritonserver does not answer its launcher: {error}; its log is {self.log}."
            ) from error
        finally:
            self.client.close()  # an open connection holds up the server's graceful stop

    def _prove(self, deadline_s: float, again: bool) -> list[str]:
        # tritonserver opens its ports once it has tried to load every model: what is not ready then never will be.
        self._wait(self._live, deadline_s)
        self._roundtrip()
        models = self._ready_models()
        # It takes a second; the inferences meanwhile.
        unloading = threading.Thread(target=self._unload_roundtrip, daemon=True)
        unloading.start()
        for name in models:
            config = self.api.config(name)
            if synthetic.is_public(config):
                synthetic.ask(self.api, config, timeout_s=REQUEST_TIMEOUT_S)
        if not again:
            unloading.join()
            self._wait(lambda: self.api.health("ready"), deadline_s)
        return models

    def _unload_roundtrip(self) -> None:
        with contextlib.suppress(OSError, Refused):  # a server that ends meanwhile is noticed elsewhere
            self.api.unload(ROUNDTRIP_MODEL)

    def _wait(self, condition: Callable[[], bool], deadline_s: float) -> None:
        while not condition():
            self.alive()
            if time.monotonic() > deadline_s:
                raise StartError(
                    f"tritonserver was not ready in time; its log is {self.log}. See --timeout-s."
                )
            time.sleep(POLL_S)

    def _live(self) -> bool:
        try:
            return self.api.health("live")
        except OSError:  # nobody listens yet, or another server does and ours is about to end
            return False

    def _ready_models(self) -> list[str]:
        rows = [row for row in self.api.index() if row["name"] != ROUNDTRIP_MODEL]
        ready = {row["name"] for row in rows if row.get("state") == "READY"}
        broken = {row["name"]: row.get("reason", "") for row in rows if row["name"] not in ready}
        if broken:
            causes = [f"  {name}: {_told(reason)}" for name, reason in broken.items() if reason]
            followers = [name for name, reason in broken.items() if not reason]
            if followers:
                causes.append(
                    f"  and with them, or for a reason that only the log names: {', '.join(followers)}"
                )
            raise StartError(
                "these models did not load:\n" + "\n".join(causes) + f"\nThe server's log is {self.log}."
            )
        return sorted(ready)

    def _numpy(self) -> str:
        try:
            facts = json.loads(self.proof_report.read_text())
        except (OSError, ValueError):
            return "NumPy of unknown version"
        return f"NumPy {facts['numpy']} (from {facts['numpy_path']})"

    def _roundtrip(self) -> None:
        state = next(row for row in self.api.index() if row["name"] == ROUNDTRIP_MODEL)
        if state["state"] != "READY":
            reason = state.get("reason", "")
            cure = f" {NUMPY_CURE}" if "numpy" in reason.lower() else ""
            raise ProofError(
                f"Triton's Python backend cannot run a model of Python and NumPy alone: {reason}.{cure}"
            )
        for name, dtype in DTYPES.items():  # BYTES last: it kills a stub that runs NumPy 2
            sent = _sample(name, dtype)
            tensor = triton.InferInput(f"IN_{name}", list(sent.shape), name)
            tensor.set_data_from_numpy(sent)
            wanted = [triton.InferRequestedOutput(f"OUT_{name}")]
            try:
                got = self.client.infer(ROUNDTRIP_MODEL, [tensor], outputs=wanted).as_numpy(f"OUT_{name}")
            except (
                InferenceServerException,
                ValueError,
            ) as error:  # ValueError: an empty buffer for three elements
                raise ProofError(
                    f"{name} does not pass through the Python stubs, which run {self._numpy()}: {error}. {NUMPY_CURE}"
                ) from error
            if got is None or got.shape != sent.shape or not np.array_equal(got, sent):
                raise ProofError(
                    f"the Python stubs, which run {self._numpy()}, return wrong {name} values: sent {sent.tolist()}, "
                    f"got {None if got is None else got.tolist()}. {NUMPY_CURE}"
                )


def _told(reason: str) -> str:
    """Triton's reason without the wrapping and the Python frames that its stub adds."""
    return (
        reason.split("\n\nAt:\n")[0].removeprefix("Internal: ").removeprefix("TritonModelException: ").strip()
    )


def _sample(name: str, dtype: Any) -> NDArray[Any]:
    if name == "BYTES":
        return np.array([b"clot", b"", b"\x00\xff\x7f"], dtype=np.object_)
    if name == "BOOL":
        return np.array([True, False, True])
    if name.startswith("FP"):
        return np.array([np.finfo(dtype).min, -1.5, 0.1, np.finfo(dtype).max], dtype=dtype)
    return np.array([np.iinfo(dtype).min, 1, 7, np.iinfo(dtype).max], dtype=dtype)
