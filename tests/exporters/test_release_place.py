"""A release is there whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from exporters.errors import ReleaseBusyError, ReleaseError, ReleaseExistsError
from exporters.release_place import hold_release

ROOT = Path(__file__).resolve().parents[2]
WRITER = """
import resource, sys, time
from pathlib import Path
from exporters.errors import ExportError
from exporters.publication import Publication, hold_repository
from exporters.release_place import hold_release

directory, what = Path(sys.argv[1]), sys.argv[2]
if what.startswith("full"):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with hold_release(directory) as place:
        place.write({"golden/0000.jpg": b"x" * 10})
        if what == "full models":
            with hold_repository(place.aside / "models"), Publication(place.aside / "models") as publication:
                publication.stage("net/1/model", b"x" * 2000)
        if what == "full":
            place.write({"release.json": b"x" * 2000})
        print("written", flush=True)
        time.sleep(60)
except ExportError as error:
    sys.exit(f"error: {error}")
"""


def writer(directory: Path, what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(directory), what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_it_appears_when_it_is_whole(tmp_path: Path) -> None:
    directory = tmp_path / "made on the way" / "release"
    with hold_release(directory) as place:
        place.write({"models/net/1/model": b"weights", "release.json": b"{}"})
        assert not directory.exists()
        place.publish()
    assert (directory / "models/net/1/model").read_bytes() == b"weights"
    assert [path.name for path in directory.parent.iterdir()] == ["release"]


def test_what_is_not_published_is_gone(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        with hold_release(directory) as place:
            place.write({"models/net/1/model": b"weights"})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(tmp_path / "deep" / "release")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["directory", "file", "broken link"])
def test_what_is_there_is_left_alone(tmp_path: Path, there: str) -> None:
    directory = tmp_path / "release"
    if there == "directory":
        directory.mkdir()
    elif there == "file":
        directory.write_text("mine")
    else:
        directory.symlink_to("nowhere")
    with pytest.raises(ReleaseExistsError, match="exists already"), hold_release(directory):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_one_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    directory = tmp_path / "release"

    def write() -> None:
        with hold_release(directory) as place:
            place.write({"release.json": b"new"})
            directory.mkdir()
            (directory / "release.json").write_text("of someone else")
            place.publish()

    with pytest.raises(ReleaseExistsError):
        write()
    assert (directory / "release.json").read_text() == "of someone else"
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_one_export_at_a_time_and_a_killed_one_leaves_no_release(tmp_path: Path) -> None:
    directory = tmp_path / "release"
    with writer(directory, "") as process:
        assert process.stdout
        assert process.stdout.readline() == "written\n"
        with pytest.raises(ReleaseBusyError, match="Wait for its end"), hold_release(directory):
            pass
        with hold_release(tmp_path / "another"):  # another place is free
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not directory.exists()
    with hold_release(directory) as place:
        assert list(place.aside.iterdir()) == []  # nothing of the killed one is mixed in
        place.write({"release.json": b"{}"})
        place.publish()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [
        "release",
        "release/release.json",
    ]


@pytest.mark.parametrize("what", ["full", "full models"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, what: str) -> None:
    with writer(tmp_path / "release", what) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith(f"error: The release {tmp_path / 'release'} cannot be written: File too large")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file" / "release", Path("/proc/clotline/release")):
        with pytest.raises(ReleaseError, match="cannot be written"), hold_release(directory):
            pass
