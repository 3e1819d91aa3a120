"""Counting stubs, seeing one die, and what is removed after a replacement. Real stubs: test_supervisor.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import stubs
from serving.processes import SHARED_MEMORY, overwrite_argument, start_time_ticks
from serving.replacement import remove_leftovers
from serving.stubs import STUB, DeathWatch, Stub, missing, stubs_of
from tests.serving.conftest import wait_until

REGION = f"clotline_test_{os.getpid()}"


@pytest.fixture
def child(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process with the command line of a stub: a shell that reads its `model` as a script and waits."""
    shutil.copy("/bin/sh", tmp_path / STUB)
    version = tmp_path / "a repository" / "tile_preprocess" / "3"
    version.mkdir(parents=True)
    (version / "model.py").write_text("read line\n")
    words = [tmp_path / STUB, version / "model.py", REGION, "1048576"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE)
    wait_until(lambda: bool(stubs_of(os.getpid())), 5)
    yield process
    process.kill()
    process.wait()


@pytest.fixture(params=[True, False], ids=["children", "parents"])
def listing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without /proc/<pid>/task/<tid>/children."""
    if not request.param:
        monkeypatch.setattr(stubs, "_children", stubs._children_by_parent)


def stub_of(child: subprocess.Popen[bytes]) -> Stub:
    return Stub(child.pid, start_time_ticks(child.pid) or 0, "tile_preprocess", "3", REGION)


def test_a_stub_is_told_by_its_command_line(child: subprocess.Popen[bytes], listing: None) -> None:
    assert stubs_of(os.getpid()) == [stub_of(child)]
    child.kill()
    wait_until(lambda: stubs_of(os.getpid()) == [], 5)  # nobody has waited for it yet


@pytest.mark.parametrize("pidfd", [True, False])
def test_a_death_ends_the_waiting(
    child: subprocess.Popen[bytes], pidfd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not pidfd:
        monkeypatch.setattr(os, "pidfd_open", lambda pid: (_ for _ in ()).throw(OSError("not permitted")))
    watch = DeathWatch()
    watch.watch(stubs_of(os.getpid()))
    assert not watch.wait(0.01)
    child.kill()
    wait_until(lambda: watch.wait(0.05), 5)
    watch.watch(stubs_of(os.getpid()))
    assert not watch.wait(0.01)
    watch.close()


def test_stubs_are_counted_by_model_and_version() -> None:
    def stub(model: str, version: str) -> Stub:
        return Stub(1, 1, model, version, "")

    config = {"instance_group": [{"count": 2, "gpus": []}]}
    two_gpus = {"instance_group": [{"count": 1, "gpus": [0, 1]}]}
    ready = {("a", "1"): config, ("a", "2"): config, ("b", "1"): two_gpus}
    full = [stub("a", "1"), stub("a", "1"), stub("a", "2"), stub("a", "2"), stub("b", "1"), stub("b", "1")]
    assert missing(full, ready) == set()
    assert missing([*full, stub("a", "1")], ready) == set()  # a new load beside an old one
    assert missing(full[1:], ready) == {"a"}
    assert missing([*full[1:], stub("a", "2")], ready) == {"a"}
    assert missing(full[:-1], ready) == {"b"}
    assert missing([], {}) == set()


def test_leftovers_are_removed_when_their_time_is_up(child: subprocess.Popen[bytes]) -> None:
    region = SHARED_MEMORY / REGION
    region.write_bytes(b"x")
    try:
        stub = stub_of(child)
        later = (stub, time.monotonic() + 60)
        assert remove_leftovers([later], time.monotonic()) == [later]
        assert stub.lives
        assert region.exists()
        assert remove_leftovers([later], time.monotonic() + 61) == []
        wait_until(lambda: not stub.lives, 5)
        assert not region.exists()
    finally:
        region.unlink(missing_ok=True)


def test_a_secret_is_overwritten_in_a_command_line() -> None:
    secret = "hush-" * 6
    process = subprocess.Popen(
        ["/bin/sh", "-c", "read line", f"--a={secret}", f"--b={secret}"], stdin=subprocess.PIPE
    )
    try:
        cmdline = Path(f"/proc/{process.pid}/cmdline")
        wait_until(lambda: secret.encode() in cmdline.read_bytes(), 5)
        if not overwrite_argument(process.pid, secret):
            pytest.skip("this system does not let a parent write into its child")
        shown = cmdline.read_bytes()
        assert secret.encode() not in shown
        assert shown.count(b"=" + b"*" * len(secret) + b"\0") == 2
        assert not overwrite_argument(process.pid, secret)
    finally:
        process.kill()
        process.wait()
