"""Publication: files are staged beside the repository, then renamed into it, or nothing happens at all.

Beside, not inside: every directory inside a model repository is a model to Triton. The staging directory is
on the repository's own file system, so that each step is one rename. Steps are journalled; when one fails,
those before it are undone in reverse and the repository is, byte for byte, as it was. Only one export at a time
holds a repository (flock on the directory itself, which leaves no file behind and ends with the process).

Where a process is killed between two renames, new versions may stand there that no ensemble points to, because
ensembles come last: the repository still serves, and the next export takes a higher version number.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from exporters.errors import RepositoryBusyError, RepositoryError


@contextlib.contextmanager
def hold_repository(repository: Path) -> Iterator[None]:
    """Hold a model repository alone; one that does not exist is made, and unmade if nothing was published.

    Raises:
        RepositoryBusyError: another export holds it.
        RepositoryError: it is not a directory, or cannot be read or written.
    """
    with hold_directory(repository):
        _sweep(repository)
        yield


@contextlib.contextmanager
def hold_directory(directory: Path) -> Iterator[None]:
    """Hold a directory alone, made if it does not exist; those that were made and are empty at the end are removed.

    Raises:
        RepositoryBusyError: another export holds it.
        RepositoryError: it is not a directory, or cannot be read or written.
    """
    made = _make_directories(directory)
    try:
        handle = _lock(directory)
        try:
            yield
        finally:
            os.close(handle)  # ends the lock
    finally:
        for each in reversed(made):
            with contextlib.suppress(OSError):  # not empty: it was published to; or renamed
                each.rmdir()


class Publication:
    """Files on their way into a model repository that is held; use it as a context manager.

    Args:
        repository: the model repository, held by `hold_repository`.
    """

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self._staged: set[Path] = set()
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> Publication:
        parent = self.repository.parent
        with _as_repository_error(self.repository):
            if parent.stat().st_dev != self.repository.stat().st_dev:
                raise RepositoryError(
                    f"{self.repository} is a mount point, and files are staged beside a repository, on its own file "
                    f"system. Use a directory inside it, for example {self.repository / 'models'}."
                )
            self._aside = Path(tempfile.mkdtemp(prefix=_staging_prefix(self.repository), dir=parent))
            (self._aside / "new").mkdir()
            (self._aside / "old").mkdir()
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._aside, ignore_errors=True)

    def stage(self, path: str, content: bytes) -> Path:
        """Write a file aside and to the disk; returns where it lies until `publish`.

        Args:
            path: ``<model>/<file>`` or ``<model>/<version>/<file>``.
            content: the whole file.

        Raises:
            RepositoryError: the disk is full, or not writable.
        """
        staged = self.staged(path)
        self._staged.add(staged)
        with _as_repository_error(self.repository):
            staged.parent.mkdir(parents=True, exist_ok=True)
            with staged.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        return staged

    @property
    def root(self) -> Path:
        """What is staged, laid out as a model repository of its own."""
        return self._aside / "new"

    def staged(self, path: str) -> Path:
        """Where a staged file lies until `publish`."""
        return self.root / path

    def withdraw(self, model: str) -> None:
        """Forget what was staged for a model."""
        shutil.rmtree(self.root / model, ignore_errors=True)

    def drop_unstaged(self) -> None:
        """Delete what others wrote among the staged files: a server that ran on them leaves byte code there."""
        for path in sorted(self.root.rglob("*"), reverse=True):  # what is in a directory before the directory
            if path.is_symlink() or not path.is_dir():
                if path not in self._staged:
                    path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()

    def publish(self, models_in_order: Sequence[str]) -> None:
        """Rename everything that was staged into the repository, or nothing.

        Args:
            models_in_order: all staged models; one that others refer to comes before them.

        Raises:
            RepositoryError: a step failed; those before it were undone.
        """
        try:
            with _as_repository_error(self.repository):
                for model in models_in_order:
                    self._publish_model(model)
                sync_directory(self.repository)
        except BaseException:  # a Ctrl-C, too, must not leave half of it
            self._roll_back()
            raise

    def _publish_model(self, model: str) -> None:
        staged, published = self.root / model, self.repository / model
        if not published.exists():
            sync_tree(staged)
            self._rename(staged, published)
            return
        # Versions first, then labels, and the configuration that speaks of them last.
        entries = sorted(
            staged.iterdir(), key=lambda entry: (not entry.is_dir(), entry.name == "config.pbtxt")
        )
        for entry in entries:
            target = published / entry.name
            if entry.is_dir() and target.exists():
                for file in sorted(entry.iterdir()):
                    self._replace(file, target / file.name)
            elif entry.is_dir():
                sync_tree(entry)
                self._rename(entry, target)
            else:
                self._replace(entry, target)
        sync_directory(published)

    def _rename(self, staged: Path, target: Path) -> None:
        staged.rename(target)
        self._undo.append(lambda: target.rename(staged))

    def _replace(self, staged: Path, target: Path) -> None:
        if not target.exists():
            self._rename(staged, target)
            return
        if target.read_bytes() == staged.read_bytes():
            return
        kept = self._aside / "old" / str(len(self._undo))
        try:
            os.link(target, kept)
        except OSError:  # a file system without hard links
            shutil.copy2(target, kept)
        staged.replace(target)
        self._undo.append(lambda: kept.replace(target))

    def _roll_back(self) -> None:
        failed = []
        while self._undo:
            try:
                self._undo.pop()()
            except OSError as error:
                failed.append(str(error))
        if failed:
            raise RepositoryError(
                f"{self.repository} could not be restored after a failed publication: {'; '.join(failed)}. "
                "Check the disk, then export again."
            )


def _make_directories(repository: Path) -> list[Path]:
    """Make a directory with all its parents; returns those that were missing, outermost first."""
    with _as_repository_error(repository):
        if repository.exists() and not repository.is_dir():
            raise RepositoryError(f"{repository} is not a directory. Name a directory as --repository.")
        missing = [directory for directory in (repository, *repository.parents) if not directory.exists()][
            ::-1
        ]
        for directory in missing:
            directory.mkdir(exist_ok=True)
    return missing


def _lock(repository: Path) -> int:
    with _as_repository_error(repository):
        handle = os.open(repository, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino != os.stat(repository).st_ino:
            raise BlockingIOError  # another export made the directory and has just unmade it
        with _as_repository_error(repository):
            os.listdir(repository)
            if not os.access(repository, os.W_OK | os.X_OK):
                raise PermissionError(13, os.strerror(13), str(repository))
    except (BlockingIOError, FileNotFoundError):
        os.close(handle)
        raise RepositoryBusyError(
            f"Another export is writing to {repository}. Wait for its end, or export to another directory."
        ) from None
    except BaseException:
        os.close(handle)
        raise
    return handle


def _staging_prefix(repository: Path) -> str:
    return f".{repository.name}.export-"


def _sweep(repository: Path) -> None:
    """Delete what killed exports left beside the repository; it is held, so that none of them still runs."""
    for left in repository.parent.glob(f"{_staging_prefix(repository)}*"):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _as_repository_error(repository: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise RepositoryError(
            f"The model repository {repository} cannot be written: {error.strerror}{where}. Nothing was published. "
            "Free space or repair its permissions, or name another directory."
        ) from error


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(root: Path) -> None:
    """Bring the names in a directory and below it to the disk."""
    for directory in (root, *(entry for entry in root.rglob("*") if entry.is_dir())):
        sync_directory(directory)
