"""The live directory: its state survives, its lock excludes, and nothing else is mistaken for one."""

from __future__ import annotations

import json
import multiprocessing
import threading
from pathlib import Path

import pytest

from serving.releases.errors import LiveBusy, NotLive
from serving.releases.live import Live, Resident, State, describe, live_directory_of


def resident(number: int) -> Resident:
    return Resident(
        number, f"{number:016x}", "tile", ["tile_classifier"], "/r", "2026-01-01T00:00:00+00:00", "me"
    )


def test_the_state_is_read_back(tmp_path: Path) -> None:
    live = Live(tmp_path / "live")
    assert live.read() == State()
    with live.hold("me"):
        live.write(State(4, resident(2), resident(1), resident(3)))
    state = live.read()
    assert state == State(4, resident(2), resident(1), resident(3))
    assert state.numbers == {1, 2, 3}
    assert state.switched() == State(4, resident(3), resident(2))
    assert live_directory_of(live.models) == tmp_path / "live"
    assert describe(tmp_path / "live")["serving"]["number"] == 2
    assert describe(tmp_path / "live")["under_way"] is True


def test_going_back_swaps_the_two() -> None:
    state = State(4, resident(3), resident(2), resident(2)).switched()
    assert (state.serving, state.previous) == (resident(2), resident(3))


def test_a_number_is_kept_for_the_release_that_it_was_promised(tmp_path: Path) -> None:
    live = Live(tmp_path / "live")
    with live.hold("me"):
        live.write(State(4, resident(3), resident(2)))
    assert live.promise("candidate", "me") == live.promise("candidate", "me") == 4
    state = live.read()
    assert (state.number_for("candidate"), state.number_for("another"), state.next_number) == (4, 5, 5)
    after_another = state.without_number(5)
    assert (after_another.number_for("candidate"), after_another.next_number) == (4, 6)
    used = after_another.without_number(4)
    assert (used.number_for("candidate"), used.promised) == (6, None)
    assert live.promise(resident(2).release_id, "me") == 2  # which has one already
    assert live.read().next_number == 5


def test_a_state_of_before_promises_is_read(tmp_path: Path) -> None:
    live = Live(tmp_path / "live")
    with live.hold("me"):
        live.write(State(4, resident(3)))
    path = tmp_path / "live" / "live.json"
    values = json.loads(path.read_text())
    del values["promised"]
    path.write_text(json.dumps(values))
    assert live.read() == State(4, resident(3))


def test_one_holds_it_at_a_time(tmp_path: Path) -> None:
    live = Live(tmp_path / "live")
    with live.hold("anna@here"), pytest.raises(LiveBusy, match="held by anna@here"), live.hold("ben@here"):
        pass
    with live.hold("ben@here"):
        pass


def hold_and_wait(directory: Path, held: multiprocessing.synchronize.Event) -> None:
    with Live(directory).hold("killed"):
        held.set()
        threading.Event().wait()


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    holder = context.Process(target=hold_and_wait, args=(tmp_path / "live", held))
    holder.start()
    assert held.wait(20)
    with pytest.raises(LiveBusy), Live(tmp_path / "live").hold("me"):
        pass
    holder.kill()
    holder.join()
    with Live(tmp_path / "live").hold("me"):
        pass


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("mine")
    with pytest.raises(NotLive, match="not empty"), Live(tmp_path).hold("me"):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["letters"]
    with (
        pytest.raises(NotLive, match="cannot be a live directory"),
        Live(tmp_path / "letters" / "x").hold("me"),
    ):
        pass
    assert live_directory_of(tmp_path / "models") is None


@pytest.mark.parametrize("content", ["{", "{}", '{"format": "clotline.live", "version": 2}'])
def test_a_damaged_state_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "live.json").write_text(content)
    with pytest.raises(NotLive, match=r"live\.json"):
        Live(tmp_path).read()


def test_the_journal_is_json_lines(tmp_path: Path) -> None:
    Live(tmp_path).journal("serving", "me", number=3)
    Live(tmp_path).journal("refused", "me", error="no\nuse")
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["serving", "refused"]
    assert lines[1]["error"] == "no\nuse"
