"""When a public model counts as proven. The server is a fake: queues of any length, without the waiting."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from serving import probes
from serving.health import Health
from serving.probes import Prober
from serving.triton_http import Refused
from tests.serving.conftest import wait_until
from tests.serving.public_model import SPEC


class FakeTriton:
    """Stands in for TritonHttp: one public model, and one that is staged for a release."""

    def __init__(self) -> None:
        self.answered = 0  # requests of clients
        self.asked = 0  # synthetic ones
        self.answer: Callable[[], list[float]] = lambda: [0.25, 0.75]
        self.rows = [
            {"name": name, "version": "1", "state": "READY"}
            for name in ("tile_classifier", "tile_classifier__r2")
        ]
        self.parameters = {"clotline_spec": {"string_value": SPEC.to_json()}}

    def index(self) -> list[dict[str, str]]:
        return self.rows

    def config(self, model: str) -> dict[str, Any]:
        return json.loads(
            json.dumps({"name": model, "input": [{"name": "tile"}], "parameters": self.parameters})
        )

    def successes(self, model: str) -> int:
        return self.answered

    def infer_bytes(self, model: str, *_: Any, timeout_s: float) -> dict[str, list[Any]]:
        assert model == "tile_classifier"
        self.asked += 1
        return {"probabilities": self.answer()}


@pytest.fixture
def triton() -> FakeTriton:
    return FakeTriton()


@pytest.fixture
def health() -> Health:
    health = Health()
    health.set_server(True)
    return health


@pytest.fixture
def prober(triton: FakeTriton, health: Health, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prober]:
    """Twenty times as fast as in earnest."""
    for name in ("LOOK_EVERY_S", "ASK_EVERY_S", "STALE_S", "CONFIGS_EVERY_S"):
        monkeypatch.setattr(probes, name, getattr(probes, name) / 20)
    prober = Prober(triton, health)  # type: ignore[arg-type]
    prober.start()
    yield prober
    prober.stop()


def problem(health: Health) -> str:
    return str(health.readiness()[1]["models"]["tile_classifier"].get("reason", ""))


def test_an_idle_model_is_asked_now_and_then(triton: FakeTriton, health: Health, prober: Prober) -> None:
    wait_until(lambda: health.ready, 5)
    assert list(health.readiness()[1]["models"]) == ["tile_classifier"]
    wait_until(lambda: triton.asked >= 3, 5)
    assert prober.unproven_s() < 1


def test_a_model_that_answers_clients_is_not_asked(
    triton: FakeTriton, health: Health, prober: Prober
) -> None:
    wait_until(lambda: health.ready, 5)
    stopping = threading.Event()

    def clients() -> None:
        while not stopping.wait(0.005):
            triton.answered += 1

    thread = threading.Thread(target=clients)
    thread.start()
    try:
        wait_until(lambda: triton.answered > 20, 5)
        before = triton.asked
        wait_until(lambda: triton.answered > 120, 5)
        assert triton.asked == before
        assert health.ready
        # A synthetic question that waits in a long queue takes nothing away from this.
        released = threading.Event()
        triton.answer = lambda: released.wait(10) and [0.25, 0.75]
        prober.doubt()
        wait_until(lambda: health.ready, 5)
        released.set()
    finally:
        stopping.set()
        thread.join()


def test_a_model_that_answers_nobody_is_not_ready(triton: FakeTriton, health: Health, prober: Prober) -> None:
    wait_until(lambda: health.ready, 5)
    released = threading.Event()
    triton.answer = lambda: released.wait(10) and [0.25, 0.75]
    wait_until(lambda: not health.ready, 5)
    assert "no answer for" in problem(health)
    wait_until(lambda: prober.unproven_s() > 0.1, 5)
    released.set()
    wait_until(lambda: health.ready, 5)


def test_a_question_that_hangs_in_a_dead_stub_holds_up_no_other(
    triton: FakeTriton, health: Health, prober: Prober
) -> None:
    def hangs() -> list[float]:
        hanging.set()
        released.wait(10)
        raise Refused(500, "Stub process 'x_0_0' is not healthy.")

    wait_until(lambda: health.ready, 5)
    hanging, released = threading.Event(), threading.Event()
    triton.answer = hangs
    assert hanging.wait(5)
    triton.answer = lambda: [0.25, 0.75]
    prober.doubt()  # the model was loaded anew
    try:
        wait_until(lambda: health.ready, 5)
    finally:
        released.set()
    asked = triton.asked
    unready = []
    wait_until(lambda: unready.append(not health.ready) or triton.asked > asked + 1, 5)
    assert not any(unready)


def test_an_error_is_told_at_once_and_forgotten_with_the_next_answer(
    triton: FakeTriton, health: Health, prober: Prober
) -> None:
    def refuse() -> list[float]:
        raise Refused(500, "Stub process 'x_0_0' is not healthy.")

    wait_until(lambda: health.ready, 5)
    triton.answer = refuse
    wait_until(lambda: "is not healthy" in problem(health), 5)
    triton.answer = lambda: [0.25, 0.75]
    wait_until(lambda: health.ready, 5)


@pytest.mark.parametrize("wrong", [[0.75, 0.25], [0.25], [], [0.5, 0.6], [None, 1.0], [-0.5, 1.5]])
def test_wrong_answers_are_told(
    triton: FakeTriton, health: Health, prober: Prober, wrong: list[float]
) -> None:
    wait_until(lambda: health.ready, 5)
    triton.answer = lambda: wrong
    wait_until(lambda: not health.ready, 5)
    assert "tile_classifier answers" in problem(health)


def test_another_release_may_answer_differently(triton: FakeTriton, health: Health, prober: Prober) -> None:
    wait_until(lambda: health.ready, 5)
    triton.parameters = {**triton.parameters, "clotline_release": {"string_value": "2"}}
    triton.answer = lambda: [0.75, 0.25]
    asked = triton.asked
    unready = []
    wait_until(lambda: unready.append(not health.ready) or triton.asked > asked + 3, 5)
    assert not any(unready)


def test_a_model_that_is_gone_from_the_repository_is_forgotten(
    triton: FakeTriton, health: Health, prober: Prober
) -> None:
    wait_until(lambda: health.ready, 5)
    triton.rows = [{"name": "tile_classifier", "state": "UNAVAILABLE", "reason": "unloaded"}]
    wait_until(lambda: not health.ready, 5)
    assert problem(health) == "Triton does not serve it: UNAVAILABLE unloaded"
    triton.rows = []
    wait_until(lambda: health.ready, 5)
    assert health.readiness()[1]["models"] == {}


def test_a_question_that_waited_too_long_is_forgotten_once_clients_are_answered(
    triton: FakeTriton, health: Health, prober: Prober
) -> None:
    wait_until(lambda: health.ready, 5)

    def times_out() -> list[float]:
        raise TimeoutError("timed out")

    triton.answer = times_out
    wait_until(lambda: "timed out" in problem(health), 5)

    def clients_are_answered() -> bool:
        triton.answered += 1
        return health.ready

    wait_until(clients_are_answered, 5)
