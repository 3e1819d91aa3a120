"""All of a publication, or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from exporters.errors import RepositoryBusyError, RepositoryError
from exporters.publication import Publication, hold_repository


def publish(repository: Path, files: dict[str, str], order: list[str]) -> None:
    with hold_repository(repository), Publication(repository) as publication:
        for path, content in files.items():
            publication.stage(path, content.encode())
        publication.publish(order)


FIRST = {
    "net/1/model": "weights 1",
    "net/config.pbtxt": "net 1",
    "ens/1/release.json": "{}",
    "ens/config.pbtxt": "1",
}
SECOND = {
    "net/2/model": "weights 2",
    "net/config.pbtxt": "net 2",
    "ens/2/release.json": "{}",
    "ens/config.pbtxt": "2",
}


def read(repository: Path) -> dict[str, str]:
    return {str(p.relative_to(repository)): p.read_text() for p in repository.rglob("*") if p.is_file()}


def test_versions_are_added_and_configurations_replaced(tmp_path: Path) -> None:
    repository = tmp_path / "with a space" / "models"
    publish(repository, FIRST, ["net", "ens"])
    assert read(repository) == FIRST
    publish(repository, SECOND, ["net", "ens"])
    assert read(repository) == FIRST | SECOND
    assert [path.name for path in repository.parent.iterdir()] == ["models"]


@pytest.mark.parametrize("blocked", ["ens", "ens/2", "ens/config.pbtxt"])
def test_a_step_that_fails_undoes_those_before_it(
    tmp_path: Path, blocked: str, snapshot: Callable[[Path], dict[str, str]]
) -> None:
    repository = tmp_path / "models"
    publish(repository, {k: v for k, v in FIRST.items() if not k.startswith(blocked)}, [
        model for model in ("net", "ens") if model != blocked
    ])  # fmt: skip
    obstacle = repository / blocked
    if blocked == "ens/config.pbtxt":
        (obstacle / "a directory").mkdir(parents=True)
    else:
        obstacle.write_text("a file where a directory must go")
    before = snapshot(repository)
    with pytest.raises(RepositoryError, match="Nothing was published"):
        publish(repository, SECOND | {"new/1/model": "x"}, ["new", "net", "ens"])
    assert snapshot(repository) == before


def test_an_interrupt_undoes_the_steps_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: Callable[[Path], dict[str, str]]
) -> None:
    repository = tmp_path / "models"
    publish(repository, FIRST, ["net", "ens"])
    before = snapshot(repository)
    replaced = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if self.parent.name == "ens":
            raise KeyboardInterrupt
        return replaced(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(repository, SECOND, ["net", "ens"])
    monkeypatch.undo()
    assert snapshot(repository) == before


def test_a_repository_that_was_made_is_unmade_when_nothing_was_published(tmp_path: Path) -> None:
    def fail(repository: Path) -> None:
        with hold_repository(repository), Publication(repository) as publication:
            publication.stage("net/1/model", b"x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(tmp_path / "deep" / "models")
    assert list(tmp_path.iterdir()) == []


def test_what_a_server_wrote_among_staged_files_is_not_published(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    with hold_repository(repository), Publication(repository) as publication:
        publication.stage("net/1/model.py", b"code")
        (publication.root / "net/1/__pycache__").mkdir()
        (publication.root / "net/1/__pycache__/model.pyc").write_bytes(b"")
        publication.drop_unstaged()
        publication.publish(["net"])
    assert sorted(path.name for path in repository.rglob("*")) == ["1", "model.py", "net"]


def test_only_one_holds_a_repository(tmp_path: Path) -> None:
    held, busy = hold_repository(tmp_path), pytest.raises(RepositoryBusyError, match="Wait for its end")
    with held, busy, hold_repository(tmp_path):
        pass
    with hold_repository(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_swept(tmp_path: Path) -> None:
    left = tmp_path / ".models.export-abc"
    (left / "new").mkdir(parents=True)
    others = tmp_path / ".models2.export-abc"
    others.mkdir()
    publish(tmp_path / "models", FIRST, ["net", "ens"])
    assert not left.exists()
    assert others.exists()


def test_a_file_is_no_repository(tmp_path: Path) -> None:
    file = tmp_path / "models"
    file.write_text("")
    with pytest.raises(RepositoryError, match="is not a directory"), hold_repository(file):
        pass
    with pytest.raises(RepositoryError), hold_repository(file / "inside"):
        pass
    assert file.read_text() == ""


def test_a_place_that_cannot_be_written_is_an_error() -> None:
    with pytest.raises(RepositoryError, match="cannot be written"), hold_repository(Path("/proc/clotline")):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("mode", [0o000, 0o500])
def test_permissions_are_reported(tmp_path: Path, mode: int) -> None:
    repository = tmp_path / "models"
    repository.mkdir(mode=mode)
    with pytest.raises(RepositoryError, match="Permission denied"), hold_repository(repository):
        pass
    repository.chmod(0o700)


def test_a_mount_point_is_refused_with_a_way_out() -> None:
    mount = Path("/dev/shm")  # noqa: S108 - nothing is written
    if not mount.is_dir() or mount.stat().st_dev == mount.parent.stat().st_dev:
        pytest.skip("no tmpfs is mounted there")
    with pytest.raises(RepositoryError, match="Use a directory inside it"), Publication(mount):
        pass
