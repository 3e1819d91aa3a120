"""Release and rollback on disk: a command that is killed anywhere leaves one whole release, and the next one cleans up."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from serving.errors import ServingError
from serving.releases import configs
from serving.releases.bundle import read_bundle
from serving.releases.errors import BadRelease, NothingToRollBackTo, NotLive
from serving.releases.live import Live
from serving.releases.preparing import prepare
from serving.releases.switching import Order, release, rollback
from tests.serving.releases.test_bundle import flip_a_byte

ME = Order(by="me")
CHANGES_FILES = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}


def bring(live: Live, directory: Path) -> dict:
    with live.hold("me"):
        return release(live, None, read_bundle(directory), ME)


def whole(live: Live, releases: dict[str, Path]) -> str:
    """Which release the directory serves; fails unless all in it belongs to that one and the one before."""
    state = live.read()
    assert state.serving
    assert state.switching is None
    resident = {entry.number: entry for entry in (state.serving, state.previous) if entry}
    wanted = {configs.SWITCH_MODEL, *state.serving.public}
    for number, entry in resident.items():
        source = next(path for path in releases.values() if read_bundle(path).release_id == entry.release_id)
        models = {path.name for path in (source / "models").iterdir()}
        wanted |= {configs.numbered(model, number) for model in models}
        for path in (p for p in (source / "models").rglob("*") if p.is_file() and p.name != "config.pbtxt"):
            model, *rest = path.relative_to(source / "models").parts
            assert (
                live.models.joinpath(configs.numbered(model, number), *rest).read_bytes() == path.read_bytes()
            )
        assert live.models.joinpath(configs.numbered("tile_preprocess", number), "1", "__pycache__").is_file()
    assert {path.name for path in live.models.iterdir()} == wanted
    for name in (configs.SWITCH_MODEL, *state.serving.public):
        config = configs.read_config(live.models / name / "config.pbtxt")
        versions = [path.name for path in (live.models / name).iterdir() if path.is_dir()]
        assert versions == [str(state.serving.number)]
        assert list(config.version_policy.specific.versions) == [state.serving.number]
        assert config.parameters["clotline_release"].string_value == state.serving.release_id
        if name != configs.SWITCH_MODEL:
            steps = {step.model_name for step in config.ensemble_scheduling.step}
            assert {configs.number_of(step) for step in steps} == {state.serving.number}
    assert list(live.staging.iterdir()) == []
    assert {path.name for path in (live.directory / "releases").iterdir()} == set(map(str, resident))
    return state.serving.release_id


def ids(releases: dict[str, Path]) -> dict[str, str]:
    return {name: read_bundle(path).release_id for name, path in releases.items()}


def test_release_and_rollback(tiny_releases: dict[str, Path], tmp_path: Path) -> None:
    live, known = Live(tmp_path / "live"), ids(tiny_releases)
    for name in ("a", "b", "c"):
        told = bring(live, tiny_releases[name])
        assert (told["release_id"], told["changed"], told["checked"]) == (known[name], True, False)
        assert whole(live, tiny_releases) == known[name]
    assert told["number"] == 3
    assert bring(live, tiny_releases["c"])["changed"] is False
    for expected in ("b", "c", "b"):
        with live.hold("me"):
            rollback(live, None, ME)
        assert whole(live, tiny_releases) == known[expected]
    assert bring(live, tiny_releases["c"])["number"] == 3, "the resident one is not brought in again"
    assert prepare(live.directory) == live.models


def test_a_promised_number_waits_for_its_release(tiny_releases: dict[str, Path], tmp_path: Path) -> None:
    live, known = Live(tmp_path / "live"), ids(tiny_releases)
    bring(live, tiny_releases["a"])
    number = live.promise(known["b"], "me")
    elsewhere = Live(tmp_path / "elsewhere")
    prepare(elsewhere.directory, tiny_releases["b"], first_number=number)
    assert whole(elsewhere, tiny_releases) == known["b"]
    assert bring(live, tiny_releases["c"])["number"] == 3
    assert bring(live, tiny_releases["b"])["number"] == number == 2
    assert elsewhere.read().numbers == {2}
    assert whole(live, tiny_releases) == known["b"]
    assert bring(live, tiny_releases["a"])["number"] == 4, "it had gone, and numbers are not used twice"


def test_a_start_needs_a_release_and_keeps_the_one_that_serves(
    tiny_releases: dict[str, Path], tmp_path: Path
) -> None:
    live = tmp_path / "live"
    with pytest.raises(NotLive, match="no release to serve"):
        prepare(live)
    assert not live.exists()
    with pytest.raises(BadRelease):
        prepare(live, tmp_path)
    assert not live.exists()
    for release_directory in (tiny_releases["a"], None, tiny_releases["a"]):
        assert prepare(live, release_directory) == live / "models"
    with pytest.raises(NotLive, match="serves release"):
        prepare(live, tiny_releases["b"])
    with Live(live).hold("me"), pytest.raises(NothingToRollBackTo):
        rollback(Live(live), None, ME)


def test_a_damaged_release_leaves_nothing(tiny_releases: dict[str, Path], tmp_path: Path) -> None:
    live = Live(tmp_path / "live")
    bring(live, tiny_releases["a"])
    before = sorted(p for p in live.models.rglob("*"))
    damaged = shutil.copytree(tiny_releases["b"], tmp_path / "damaged")
    flip_a_byte(damaged)
    with pytest.raises(BadRelease, match="was changed"):
        bring(live, damaged)
    assert sorted(p for p in live.models.rglob("*")) == before
    assert whole(live, tiny_releases) == ids(tiny_releases)["a"]
    assert bring(live, tiny_releases["b"])["number"] == 3, "a number that failed is not used again"
    assert '"event":"refused"' in (live.directory / "journal.jsonl").read_text()


def test_a_full_disk_leaves_nothing(
    tiny_releases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = Live(tmp_path / "live")
    bring(live, tiny_releases["a"])
    real, count = os.fsync, itertools.count()

    def full(handle: int) -> None:
        if next(count) == 6:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ServingError, match="No space left on device"):
        bring(live, tiny_releases["b"])
    assert next(count) > 6
    assert whole(live, tiny_releases) == ids(tiny_releases)["a"]


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Run in a child that kills itself before its `step`-th operation on files; False if it came to its end first."""
    pid = os.fork()
    if pid == 0:
        left = itertools.count(step, -1)

        def count_down(event: str, arguments: tuple) -> None:
            reads = event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if event in CHANGES_FILES and not reads and next(left) <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count_down)
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


# Every operation was tried once; here some keep it short.
@pytest.mark.parametrize(("command", "stride"), [("release", 7), ("rollback", 2), ("start", 9)])
def test_killed_anywhere_leaves_one_whole_release(
    command: str, stride: int, tiny_releases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a kill is no loss of power
    known, template = ids(tiny_releases), tmp_path / "template"
    bring(Live(template), tiny_releases["a"])
    bring(Live(template), tiny_releases["c"])
    bundle = read_bundle(tiny_releases["b"])
    may = {"release": "cb", "rollback": "ca", "start": "b"}[command]
    ended = set()
    for step in itertools.count(1, stride):
        live = Live(tmp_path / f"live{step}")
        if command != "start":
            shutil.copytree(template, live.directory)

        def work(live: Live = live) -> None:
            if command == "start":
                prepare(live.directory, tiny_releases["b"])
                return
            with live.hold("killed"):
                release(live, None, bundle, ME) if command == "release" else rollback(live, None, ME)

        was_killed = killed_at(step, work)
        prepare(live.directory, tiny_releases["b"] if command == "start" else None)
        ended.add(whole(live, tiny_releases))
        shutil.rmtree(live.directory)
        if not was_killed:
            break
    assert ended == {known[name] for name in may}
    assert step > 15
