"""The live directory: what a server serves, on disk, and who holds it. It is the state: a restart serves the same release.

LIVE/live.json       which release serves, which is resident, and a switch that is under way
LIVE/journal.jsonl   who did what and when, a JSON document a line
LIVE/lock            held (flock) by the one release, rollback or start that may write here
LIVE/models/         the model repository of the server: <model>__r<N>, the public models, clotline_release
LIVE/releases/<N>/   manifest and golden examples of the resident releases
LIVE/staging/        copies on their way; nothing looks there
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from serving.releases.errors import LiveBusy, NotLive, ReleaseError

STATE, JOURNAL, LOCK = "live.json", "journal.jsonl", "lock"
FORMAT, VERSION = "clotline.live", 1


@dataclass(frozen=True)
class Resident:
    """A release that is loaded: its number here, and since when it answers (or did so last)."""

    number: int
    release_id: str
    kind: str
    public: list[str]
    source: str
    since_utc: str
    by: str
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Promise:
    """A number that only this release may have: another server answers as that already."""

    number: int
    release_id: str


@dataclass(frozen=True)
class State:
    """What live.json says. `switching`: the number that public models are on their way to, if a switch is under way."""

    next_number: int = 1
    serving: Resident | None = None
    previous: Resident | None = None
    switching: Resident | None = None
    promised: Promise | None = None

    @property
    def numbers(self) -> set[int]:
        """Numbers of all releases that must stay."""
        return {entry.number for entry in (self.serving, self.previous, self.switching) if entry}

    def number_for(self, release_id: str) -> int:
        """The number of a release: that which it has, was promised, or would get."""
        for known in (self.serving, self.previous, self.promised):
            if known and known.release_id == release_id:
                return known.number
        return self.next_number

    def without_number(self, number: int) -> State:
        """The state after which no other release gets this number."""
        promised = None if self.promised and self.promised.number == number else self.promised
        return replace(self, next_number=max(self.next_number, number + 1), promised=promised)

    def switched(self) -> State:
        """The state after the switch that is under way."""
        if not self.switching:
            return self
        previous = (
            self.serving if self.serving and self.serving.number != self.switching.number else self.previous
        )
        return replace(self, serving=self.switching, previous=previous, switching=None)


@dataclass(frozen=True)
class Live:
    """A live directory; `hold` it before writing."""

    directory: Path

    @property
    def models(self) -> Path:
        """The model repository."""
        return self.directory / "models"

    @property
    def staging(self) -> Path:
        """Where copies are made, on the file system of `models`."""
        return self.directory / "staging"

    def release(self, number: int) -> Path:
        """Where manifest and golden examples of a resident release lie."""
        return self.directory / "releases" / str(number)

    def read(self) -> State:
        """The state; an empty one where no release was made yet. Raises NotLive if live.json is not readable."""
        path = self.directory / STATE
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            return State()
        except (OSError, ValueError) as error:
            raise NotLive(f"{path} cannot be read: {error}.") from error
        try:
            if (values["format"], values["version"]) != (FORMAT, VERSION):
                raise NotLive(f"{path} is of format {values['format']!r}, version {values['version']!r}.")
            entries = {
                key: values[key] and Resident(**values[key]) for key in ("serving", "previous", "switching")
            }
            promised = values.get("promised")
            return State(
                next_number=int(values["next_number"]), promised=promised and Promise(**promised), **entries
            )
        except (KeyError, TypeError, ValueError) as error:
            raise NotLive(f"{path} is not the state of a live directory: {error!r}.") from error

    def write(self, state: State) -> None:
        """Replace live.json, whole, and on the disk when this returns."""
        values = {"format": FORMAT, "version": VERSION, **asdict(state)}
        aside = self.directory / f".{STATE}.partial"
        with aside.open("w") as stream:
            json.dump(values, stream, indent=1, sort_keys=True)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(self.directory / STATE)
        sync_directory(self.directory)

    def promise(self, release_id: str, by: str) -> int:
        """A number that only this release may have from now on, for a server elsewhere that serves it before this one does.

        Raises LiveBusy while a command is at work.
        """
        with self.hold(by):
            state = self.read()
            number = state.number_for(release_id)
            self.write(replace(state.without_number(number), promised=Promise(number, release_id)))
        return number

    def journal(self, event: str, by: str, **details: Any) -> None:
        """Add a line to the journal."""
        line = {"utc": now_utc(), "event": event, "by": by, "pid": os.getpid(), **details}
        handle = os.open(self.directory / JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, json.dumps(line, separators=(",", ":")).encode() + b"\n")
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def hold(self, by: str) -> Iterator[None]:
        """Hold the directory alone; it is made if it does not exist. The lock ends with the process, however it ends.

        Raises LiveBusy naming who holds it, NotLive if it cannot be a live directory.
        """
        self._make()
        handle = os.open(self.directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(handle, 300).decode(errors="replace").strip()
                raise LiveBusy(
                    f"{self.directory} is held by {holder or 'another command'}: one release at a time. Wait for its end."
                ) from None
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{by}, pid {os.getpid()}, since {now_utc()}\n".encode(), 0)
            yield
        finally:
            os.close(handle)

    def _make(self) -> None:
        own = {STATE, JOURNAL, LOCK, "models", "staging", "releases", f".{STATE}.partial"}
        try:
            if self.directory.is_dir() and not {entry.name for entry in self.directory.iterdir()} <= own:
                raise NotLive(
                    f"{self.directory} is not empty and no live directory; name a new directory, which `release` fills."
                )
            for directory in (self.directory, self.models, self.staging, self.directory / "releases"):
                directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NotLive(f"{self.directory} cannot be a live directory: {error.strerror}.") from error


def live_directory_of(repository: Path | str) -> Path | None:
    """The live directory that a server's model repository belongs to, None for a plain repository."""
    directory = Path(repository).resolve().parent
    is_live = (
        Path(repository).name == "models" and (directory / LOCK).exists() and (directory / STATE).exists()
    )
    return directory if is_live else None


def describe(directory: Path) -> dict[str, Any]:
    """Which release serves, which is resident, since when and by whom, as JSON types. Reads live.json only.

    `under_way` is true while a switch is under way, or was when its command was killed.
    """
    state = Live(directory).read()
    told = {
        name: entry and {key: value for key, value in asdict(entry).items() if value}
        for name, entry in (("serving", state.serving), ("resident", state.previous))
    }
    return {"live": str(directory), **told, "under_way": state.switching is not None}


def now_utc() -> str:
    """Now, as 2026-01-31T12:00:00.000+00:00."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def caller() -> str:
    """user@host of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def sync_directory(directory: Path) -> None:
    """Write the entries of a directory to the disk."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a directory with all in it; one that does not exist is fine.

    Raises ReleaseError if something cannot be deleted.
    """
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ReleaseError(f"{path} cannot be deleted: {error.strerror}; repair its permissions.") from error
