"""Finds out that a stub is missing, and has Triton load its model anew.

Unloading a model whose stub was killed never ends in Triton 2.51 (a destructor waits for the dead process), and takes
the ensembles above it down. Loading it anew works beside the broken one, if the configuration differs: a number
without effect on a CPU (`optimization.gather_kernel_buffer_threshold`) is counted up. The broken one answers from its
living instances until the new one is ready; pinned ensembles stay up. What it leaves behind is removed by us: stubs of
the old load that do not end, and the names of their shared memory.

Where no instance lives, each request that waits for one takes a second to fail, in turn, and holds up the slide that asked.
Where that would take longer than a start of the server, the server is restarted instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from serving.health import Health
from serving.instances import InstanceState
from serving.stubs import DeathWatch, Stub, missing, stubs_of
from serving.triton_http import Refused, TritonHttp, pending_requests
from serving.tritonserver import ADMIN_METADATA, python_based_backends

LOOK_EVERY_S = 1.0  # for new stubs, so that they are watched; a death is seen at once
COUNT_EVERY_S = 5.0
CALL_TIMEOUT_S = 1.5
LOAD_TIMEOUT_S = 120.0
LEFTOVER_S = 30.0  # old instances may finish what they were given
CERTAIN_AFTER_S = 0.05
FAILING_TAKES_S = 1.0  # a request of which the stub is dead, in Triton's Python backend
MOST_REPLACEMENTS = 10  # each leaves a thread and a little memory behind in tritonserver


class StubKeeper:
    """Watches the stubs of one running tritonserver.

    Args:
        doubt: called when models were replaced: what was proven of them counts no more.
        start_s: how long a restart of the server takes.
    """

    def __init__(
        self, server_pid: int, state: InstanceState, health: Health, doubt: Callable[[], None], start_s: float
    ) -> None:
        self.replaced = 0
        self._doubt = doubt
        self._start_s = start_s
        self._pid = server_pid
        self._state = state
        self._api = TritonHttp(state.http, state.admin_token, timeout_s=CALL_TIMEOUT_S)
        self._health = health
        self._watch = DeathWatch()
        self._known = stubs_of(server_pid)
        self._watch.watch(self._known)
        self._leftovers: list[tuple[Stub, float]] = []
        self._stubless: set[tuple[str, str]] = set()
        self._backends = {"python", *python_based_backends()}
        # The server has just been proven: where the count does not fit now, the counting is wrong.
        self._uncounted: set[str] = set()
        with contextlib.suppress(OSError):  # so busy at its very start: then it is trusted to be whole
            self._uncounted = self._missing()
        self._looked_s = self._counted_s = time.monotonic()
        self._loading: threading.Thread | None = None
        self._problem: str | None = None

    def wait(self, timeout_s: float) -> bool:
        """True as soon as a stub has ended, False after `timeout_s`."""
        return self._watch.wait(timeout_s)

    def look(self, died: bool) -> str | None:
        """Count the stubs if one has died or it is time to, and have missing ones replaced.

        Returns why the server must be restarted, if it must.
        """
        now_s = time.monotonic()
        finished = False
        if self._loading:
            if self._loading.is_alive():
                if died:  # it is counted when the load is done; until then it would end every waiting at once
                    self._watch.watch(stubs_of(self._pid))
                return None
            self._loading, finished = None, True
            if self._problem:
                return self._problem
            self._doubt()
        self._leftovers = remove_leftovers(self._leftovers, now_s)
        if not (died or finished or now_s - self._looked_s >= LOOK_EVERY_S):
            return None
        self._looked_s = now_s
        before, self._known = self._known, stubs_of(self._pid)
        self._watch.watch(self._known)
        dead = [stub for stub in before if not stub.lives]
        changed = set(before) != set(self._known)
        if not (finished or changed or now_s - self._counted_s >= COUNT_EVERY_S):
            return None
        self._counted_s = now_s
        try:
            models = sorted(self._missing() - self._uncounted)
        except (OSError, Refused) as error:
            if dead:  # Triton is too busy to say whether it ended them itself: asked again at the next look
                self._looked_s = self._counted_s = 0.0
                self._health.set_broken({stub.model: f"its stub ended, and: {error}" for stub in dead})
            return None
        self._health.set_broken(dict.fromkeys(models, "a stub of it died; it is loaded anew"))
        if models and self.replaced >= MOST_REPLACEMENTS:
            return f"stubs of {', '.join(models)} died, after {self.replaced} replacements"
        if not models:
            return None
        lost = self._lost(dead)
        if lost is None:
            self._loading = threading.Thread(target=self._load, args=(models, dead), daemon=True)
            self._loading.start()
        return lost

    def _missing(self) -> set[str]:
        """Models of which a stub is missing, seen twice: a load may have ended between two questions."""
        found = self._missing_now()
        if found:
            time.sleep(CERTAIN_AFTER_S)
            found &= self._missing_now()
        return found

    def _missing_now(self) -> set[str]:
        living = self._living()
        configs: dict[tuple[str, str], dict[str, Any]] = {}
        for row in self._api.index():
            key = (row["name"], row.get("version", ""))
            if row.get("state") != "READY" or key in self._stubless:
                continue
            config = self._api.config(*key)
            if config.get("backend") in self._backends:
                configs[key] = config
            else:
                self._stubless.add(key)
        return missing(living, configs)

    def _living(self) -> list[Stub]:
        replaced = {stub for stub, _ in self._leftovers}  # alive, perhaps, and of no use
        return [stub for stub in stubs_of(self._pid) if stub not in replaced]

    def _lost(self, dead: list[Stub]) -> str | None:
        """What waits for too long for models of which no instance lives, None if nothing does."""
        nobody = {(stub.model, stub.version) for stub in dead}
        nobody -= {(stub.model, stub.version) for stub in self._living()}
        if not nobody:
            return None
        try:
            pending = pending_requests(self._state.metrics, timeout_s=CALL_TIMEOUT_S)
        except OSError:  # busy: the load is tried
            return None
        waiting = sum(pending.get(key, 0) for key in nobody)
        if waiting * FAILING_TAKES_S <= self._start_s:
            return None
        names = ", ".join(sorted(model for model, _ in nobody))
        return f"{waiting} requests waited for {names}, of which no stub was alive"

    def _load(self, models: list[str], dead: list[Stub]) -> None:
        for model in models:
            before = [stub for stub in self._known if stub.model == model]
            try:
                config = self._api.config(model)
                optimization = config.setdefault("optimization", {})
                number = int(optimization.get("gather_kernel_buffer_threshold", 0))
                optimization["gather_kernel_buffer_threshold"] = number + 1
                load(self._state, model, config)
            except (OSError, Refused, ValueError) as error:
                self._problem = f"a stub of {model} died, and it could not be loaded anew: {error}"
                return
            self.replaced += 1
            self._health.replacements[model] = self._health.replacements.get(model, 0) + 1
            deadline_s = time.monotonic() + LEFTOVER_S
            self._leftovers += [(stub, deadline_s) for stub in before]
        for stub in dead:
            stub.remove_shared_memory()

    def close(self) -> None:
        """Watch no more."""
        self._watch.close()


def load(state: InstanceState, model: str, config: dict[str, Any]) -> None:
    """Load a model with this configuration; returns when it is ready. Raises Refused or OSError.

    Over gRPC, if it is not encrypted: a load over HTTP holds up all connections of one of Triton's HTTP threads.
    """
    if state.grpc_tls != "off":
        TritonHttp(state.http, state.admin_token).load(model, config, timeout_s=LOAD_TIMEOUT_S)
        return
    import tritonclient.grpc as triton  # loaded when the first stub has died
    from tritonclient.utils import InferenceServerException

    client = triton.InferenceServerClient(state.grpc)
    try:
        headers = {ADMIN_METADATA: state.admin_token}
        client.load_model(model, headers=headers, config=json.dumps(config), client_timeout=LOAD_TIMEOUT_S)
    except InferenceServerException as error:
        raise Refused(500, str(error)) from error
    finally:
        client.close()


def remove_leftovers(leftovers: list[tuple[Stub, float]], now_s: float) -> list[tuple[Stub, float]]:
    """Kill the stubs whose time is up, remove their shared memory, and return the others."""
    for stub in [stub for stub, deadline_s in leftovers if now_s > deadline_s]:
        if stub.lives:
            with contextlib.suppress(OSError):
                os.kill(stub.pid, signal.SIGKILL)
        stub.remove_shared_memory()
    return [entry for entry in leftovers if now_s <= entry[1]]
