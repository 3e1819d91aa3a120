"""Where a release is written: aside, by one export at a time, and renamed when it is whole.

DIR is written as `.<name>.partial-export` beside it, which is held with flock for as long as the export lives. Killed at
any point, there is no DIR, and the next export to the same place clears what was left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from exporters.errors import (
    ReleaseBusyError,
    ReleaseError,
    ReleaseExistsError,
    RepositoryBusyError,
    RepositoryError,
)
from exporters.publication import hold_directory, sync_directory, sync_tree

_DISK_FAILED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class ReleasePlace:
    """A release that is being written.

    Attributes:
        directory: where it will be.
        aside: where it is until `publish`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.aside = directory.with_name(f".{directory.name}.partial-export")

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write files, path below the release -> content, to the disk; raises ReleaseError."""
        with self.as_release_error():
            for path, content in files.items():
                target = self.aside / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())

    def publish(self) -> None:
        """Rename what was written into place."""
        with self.as_release_error():
            sync_tree(self.aside)
            refuse_existing(self.directory)
            self.aside.rename(self.directory)
            sync_directory(self.directory.parent)

    @contextlib.contextmanager
    def as_release_error(self, codes: Collection[int] | None = None) -> Iterator[None]:
        """Errors of the file system, and of the repository inside the release, as one ReleaseError.

        Args:
            codes: only those errors of the file system; None for all.
        """
        try:
            yield
        except OSError as error:
            if codes is not None and error.errno not in codes:
                raise
            raise self._cannot_be_written(error) from error
        except RepositoryError as error:
            if isinstance(error.__cause__, OSError):
                raise self._cannot_be_written(error.__cause__) from error
            raise

    def _cannot_be_written(self, error: OSError) -> ReleaseError:
        where = f" ({error.filename})" if error.filename else ""
        return ReleaseError(
            f"The release {self.directory} cannot be written: {error.strerror}{where}. Nothing was published. "
            "Free space or repair its permissions, or name another directory."
        )


@contextlib.contextmanager
def hold_release(directory: Path) -> Iterator[ReleasePlace]:
    """A place to write a release; what was not published is gone afterwards.

    Raises:
        ReleaseExistsError: there is something already.
        ReleaseBusyError: another export is writing to the same place.
        ReleaseError: its parent is no directory, or cannot be written.
    """
    refuse_existing(directory)
    place = ReleasePlace(directory)
    try:
        with place.as_release_error(_DISK_FAILED), hold_directory(place.aside):
            refuse_existing(directory)  # another export may have ended since
            with place.as_release_error():
                _clear(place.aside)
            try:
                yield place
            finally:
                with contextlib.suppress(OSError):
                    _clear(place.aside)
                    place.aside.rmdir()
    except RepositoryBusyError:
        raise ReleaseBusyError(
            f"Another export is writing {directory}. Wait for its end, or name another directory as --release."
        ) from None


def refuse_existing(directory: Path) -> None:
    """Raise ReleaseExistsError if there is anything at `directory`, a broken link included."""
    if os.path.lexists(directory):
        raise ReleaseExistsError(
            f"{directory} exists already; a release is never changed. Name another directory as --release, or delete it."
        )


def _clear(directory: Path) -> None:
    for entry in list(directory.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
