"""Keeps proving the public models of one running server.

A model is proven by a request of a client that was answered, which Triton's statistics tell, and only where there was
none for a while by a synthetic question: a busy model is never asked on top, and a synthetic question that waits in a
long queue makes nobody unready as long as the queue moves.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from serving import synthetic
from serving.errors import ProofError
from serving.health import Health
from serving.triton_http import Refused, TritonHttp

LOOK_EVERY_S = 1.0
ASK_EVERY_S = 2.0
ASK_TIMEOUT_S = 30.0
STALE_S = 6.0
CONFIGS_EVERY_S = 5.0
SAME_ANSWER = 0.05  # of a probability; batches and INT8 move it by less, zeros and mixed-up memory by more


@dataclass
class Proof:
    """What is known of one public model."""

    config: dict[str, Any]
    version: int = 0
    successes: int = -1
    proven_at_s: float | None = None
    asked_at_s: float = 0.0
    asking: bool = False
    failure: str | None = None
    timed_out: bool = False
    reference: list[float] | None = None
    absent_looks: int = 0
    absence: str = ""

    def problem(self, now_s: float) -> str | None:
        """Why it is not proven lately, None if it is."""
        if self.absent_looks >= 2:
            return f"Triton does not serve it: {self.absence}"
        if self.failure:
            return self.failure
        if self.proven_at_s is None:
            return "not proven yet"
        age_s = now_s - self.proven_at_s
        return f"no answer for {age_s:.0f} s" if age_s > STALE_S else None


class Prober:
    """Looks at one server from a thread of its own and tells `health` of its public models."""

    def __init__(self, api: TritonHttp, health: Health) -> None:
        self._api = api
        self._health = health
        self._proofs: dict[str, Proof] = {}
        self._configs: dict[str, dict[str, Any]] = {}
        self._ready: dict[str, int] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopped = False
        self._healthy_at_s = time.monotonic()
        self._configs_at_s = -CONFIGS_EVERY_S
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Look for the first time before this returns, then every second."""
        self._look()
        self._thread.start()

    def stop(self) -> None:
        """Say no more to `health`."""
        with self._lock:
            self._stopped = True
        self._wake.set()

    def doubt(self) -> None:
        """Something happened to the models: neither what was proven before nor what is being asked counts any more."""
        with self._lock:
            for proof in self._proofs.values():
                proof.proven_at_s, proof.failure, proof.timed_out = None, None, False
                proof.asking, proof.asked_at_s = False, time.monotonic()  # it may hang in what is dead
            self._tell()
        self._configs_at_s = -CONFIGS_EVERY_S
        self._wake.set()

    def unproven_s(self) -> float:
        """For how long now at least one public model has not been proven; 0 if all are."""
        with self._lock:
            return time.monotonic() - self._healthy_at_s

    def public(self) -> dict[str, tuple[dict[str, Any], int]]:
        """The public models that Triton serves: name -> configuration and newest version that is ready."""
        with self._lock:
            return {
                name: (proof.config, proof.version) for name, proof in self._proofs.items() if proof.version
            }

    def _run(self) -> None:
        while not self._stopped:
            self._wake.wait(LOOK_EVERY_S)
            self._wake.clear()
            self._look()

    def _look(self) -> None:
        trouble = None
        try:
            self._read_index()
            for name, proof in list(self._proofs.items()):
                if not proof.absent_looks:
                    self._read_successes(name, proof)
        except (OSError, Refused) as error:
            trouble = f"Triton does not answer: {error}"
        with self._lock:
            self._tell(trouble)

    def _tell(self, trouble: str | None = None) -> None:
        if self._stopped:
            return
        now_s = time.monotonic()
        reasons = {name: proof.problem(now_s) for name, proof in self._proofs.items()}
        if trouble:
            reasons = {name: reason and f"{reason}; {trouble}" for name, reason in reasons.items()}
        if not any(reasons.values()):
            self._healthy_at_s = now_s
        self._health.set_models(reasons)

    def _read_index(self) -> None:
        rows = self._api.index()
        ready: dict[str, int] = {}
        for row in rows:
            if row.get("state") == "READY":
                ready[row["name"]] = max(ready.get(row["name"], 0), int(row.get("version", 0)))
        listed = {row["name"]: f"{row.get('state', '')} {row.get('reason', '')}".strip() for row in rows}
        if time.monotonic() - self._configs_at_s >= CONFIGS_EVERY_S or ready != self._ready:
            self._configs = {name: self._api.config(name) for name in ready}
            self._configs_at_s, self._ready = time.monotonic(), ready
        with self._lock:
            for name in set(self._proofs) - set(listed):
                del self._proofs[name]  # it is gone from the repository: nobody expects it
            for name, proof in self._proofs.items():
                proof.absent_looks = 0 if name in ready else proof.absent_looks + 1
                proof.absence = listed[name]
            for name in set(ready) & set(self._configs):
                config = self._configs[name]
                if not synthetic.is_public(config):
                    self._proofs.pop(name, None)
                elif name not in self._proofs:
                    self._proofs[name] = Proof(config)
                elif self._proofs[name].config != config:  # another release: its answers are its own
                    self._proofs[name].config, self._proofs[name].reference = config, None
                if name in self._proofs:
                    self._proofs[name].version = ready[name]

    def _read_successes(self, name: str, proof: Proof) -> None:
        successes = self._api.successes(name)
        now_s = time.monotonic()
        with self._lock:
            if successes != proof.successes and successes > 0 and proof.successes >= 0:
                proof.proven_at_s = now_s
                if proof.timed_out:  # the question waited behind clients, who get their answers
                    proof.failure, proof.timed_out = None, False
            proof.successes = successes
            proven_lately = proof.proven_at_s is not None and now_s - proof.proven_at_s < ASK_EVERY_S
            if proof.asking or (proven_lately and not proof.failure):
                return
            proof.asking, proof.asked_at_s = True, now_s
        threading.Thread(target=self._ask, args=(name, proof, now_s), daemon=True).start()

    def _ask(self, name: str, proof: Proof, asked_at_s: float) -> None:
        failure, timed_out = None, False
        try:
            self._ask_and_compare(name, proof)
        except (ProofError, Refused) as error:
            failure = str(error)
        except OSError as error:
            failure, timed_out = f"{name} did not answer a synthetic question: {error}", True
        with self._lock:
            if proof.asked_at_s != asked_at_s:  # doubted meanwhile
                return
            proof.asking = False
            if timed_out and proof.proven_at_s is not None and proof.proven_at_s > proof.asked_at_s:
                return  # clients were answered while it waited
            proof.failure, proof.timed_out = failure, timed_out
            if failure is None:
                proof.proven_at_s = time.monotonic()
        if not failure:
            self._wake.set()

    def _ask_and_compare(self, name: str, proof: Proof) -> None:
        for _ in range(2):
            config = self._api.config(name)
            answer = synthetic.ask(self._api, config, timeout_s=ASK_TIMEOUT_S)
            unchanged = self._api.config(name) == config  # else the answer may be of either release
            with self._lock:
                if config != proof.config:
                    proof.config, proof.reference = config, None
                if proof.reference is None and unchanged:
                    proof.reference = answer
                reference = proof.reference or answer
            if max(abs(a - b) for a, b in zip(answer, reference, strict=True)) <= SAME_ANSWER:
                return
        raise ProofError(f"{name} answers {answer} where it answered {reference} when it was proven first.")
