"""What an interrupted training goes on from.

OUT/state/about.json                    what is being trained: recipe, data, processes, versions
OUT/state/save-0000000012/
    process-0-of-2.<sha256>.pt          the network, the optimiser and what else all processes share; process 0's own
    process-1-of-2.<sha256>.pt          what only process 1 has: its generators, its BatchNorm statistics

A file is written aside, under the name of its own checksum, and renamed; a save counts when the files of all
processes are there and are what their names say. Whatever moment a process is killed at, the newest save that counts
is whole. Two of them are kept. Processes on several machines need OUT on a file system that all of them see.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from training.atomic_file import write_text
from training.errors import ResumeError

KEPT_SAVES = 2
ABOUT_NAME = "about.json"
_SAVE_NAME = re.compile(r"save-(\d{10})")
_FILE_NAME = re.compile(r"process-(\d+)-of-(\d+)\.([0-9a-f]{64})\.pt")


class StateKeeper:
    """Saves the state of one process, and finds it again.

    Args:
        directory: OUT/state; made when something is saved first.
        about: JSON types; a training goes on only where all of it is as it was.
        save_every_s: least time between two saves within an epoch.
    """

    def __init__(
        self, directory: Path, about: Mapping[str, Any], *, process: int, processes: int, save_every_s: float
    ) -> None:
        self.directory = directory
        self.about = dict(about)
        self.process = process
        self.processes = processes
        self.save_every_s = save_every_s
        self._saves = 0
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """While training: a kill leaves a state, or at least the fact; an error leaves nothing but a state."""
        if self.process == 0 and not has_saved(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_text(self.directory / ABOUT_NAME, json.dumps(self.about, indent=2) + "\n")
        try:
            yield
        finally:
            self.wait()
            if self.process == 0 and not has_saved(self.directory):
                self.discard()

    def find(self) -> Path | None:
        """The newest whole save, or None; what is newer than it and torn is removed. For the main process.

        Raises:
            ResumeError: the state is of another training.
        """
        refuse_other(self.directory, self.about)
        for save in reversed(_saves_in(self.directory)):
            if _is_whole(save):
                return save
            print(f"warning: {save} is not whole and is not used", file=sys.stderr)
            shutil.rmtree(save, ignore_errors=True)
        return None

    def load(self, save: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what all processes share, what is this process's own) of a save that `find` has found; on the CPU.

        Raises:
            ResumeError: the files cannot be read.
        """
        try:
            main = _read(save, 0, self.processes)
            own = main if self.process == 0 else _read(save, self.process, self.processes)
        except (OSError, RuntimeError, ValueError) as error:
            raise ResumeError(str(save), [f"cannot be read: {error}; --restart begins anew"]) from error
        self._saves = int(save.name.partition("-")[2])
        return main["shared"], own["own"]

    def save(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Copy the state now and write it in the background; only process 0's `shared` is written.

        A disk that cannot be written does not end the training: it is warned about, and tried again next time.
        """
        self.wait()
        self._saves += 1
        content = {"shared": _on_cpu(shared) if self.process == 0 else None, "own": _on_cpu(own)}
        name = f"save-{self._saves:010d}"
        self._writing = threading.Thread(target=self._write, args=(name, content), name="state")
        self._writing.start()

    def wait(self) -> None:
        """Until what was saved last is on the disk."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._failure is not None:
            print(
                f"warning: the state of this training cannot be saved in {self.directory}: {self._failure}; training "
                "goes on, but after a kill it would go on from the last state that was saved, if any",
                file=sys.stderr,
            )
            self._failure = None

    def discard(self) -> None:
        """Remove everything; for the main process, once all others have waited."""
        self.wait()
        shutil.rmtree(self.directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.directory.parent.rmdir()  # where nothing else is in it

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        try:
            if self.process == 0:
                self._prune()
            directory = self.directory / name
            directory.mkdir(parents=True, exist_ok=True)
            aside = directory / f".process-{self.process}.partial"
            with aside.open("wb") as stream:
                digesting = _Digesting(stream)
                torch.save(content, digesting)  # type: ignore[arg-type]
                stream.flush()
                os.fsync(stream.fileno())
            checksum = digesting.digest.hexdigest()
            os.replace(aside, directory / f"process-{self.process}-of-{self.processes}.{checksum}.pt")
            _sync_directory(directory)
        except BaseException as error:
            self._failure = error

    def _prune(self) -> None:
        """Only saves that the newest whole ones have made superfluous go, so that one is there at every moment."""
        whole = [save for save in _saves_in(self.directory) if _files(save)]
        for save in _saves_in(self.directory):
            if len(whole) >= KEPT_SAVES and save.name < whole[-KEPT_SAVES].name:
                shutil.rmtree(save, ignore_errors=True)


def has_saved(directory: Path) -> bool:
    """Whether an interrupted training has saved anything in `directory`."""
    return any(_files(save) for save in _saves_in(directory))


def goes_on(directory: Path, about: Mapping[str, Any]) -> bool:
    """Whether a training of `about` was interrupted here, even if it was so before it saved anything.

    Raises:
        ResumeError: as `refuse_other`.
    """
    refuse_other(directory, about)
    path = directory / ABOUT_NAME
    return path.is_file() and not _differences(_read_about(path), _as_json(about))


def refuse_other(directory: Path, about: Mapping[str, Any]) -> None:
    """Raise ResumeError if `directory` holds a state and was written with anything else than `about` says.

    `about` may be a part of what was written, so that much of it can be checked before any slide is opened.
    """
    if not _saves_in(directory):
        return
    problems = _differences(_read_about(directory / ABOUT_NAME), _as_json(about))
    if problems:
        raise ResumeError(
            f"{directory} is of an interrupted training that cannot go on like this; run it as it was started, or "
            "give --restart to begin anew",
            problems,
        )


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in now.items():
        before = then.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            found += _differences(before, value, f"{prefix}{key}.")
            found += [f"{prefix}{key}.{gone} was {before[gone]!r}" for gone in before.keys() - value.keys()]
        elif before != value:
            found.append(f"{prefix}{key} was {before!r:.120}, is {value!r:.120}")
    return found


def _saves_in(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _SAVE_NAME.fullmatch(path.name))


def _files(save: Path) -> list[Path]:
    """One file a process, in their order; [] unless all processes' are there."""
    named = {
        (int(found[1]), int(found[2])): path
        for path in save.iterdir()
        if (found := _FILE_NAME.fullmatch(path.name))
    }
    for processes in {of for _, of in named}:
        if all((process, processes) in named for process in range(processes)):
            return [named[process, processes] for process in range(processes)]
    return []


def _is_whole(save: Path) -> bool:
    files = _files(save)
    return bool(files) and all(_checksum(path) == path.name.split(".")[1] for path in files)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read(save: Path, process: int, processes: int) -> dict[str, Any]:
    path = next(save.glob(f"process-{process}-of-{processes}.*.pt"), None)
    if path is None:
        raise FileNotFoundError(f"the file of process {process} is missing")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResumeError(str(path), [f"cannot be read: {error}; --restart begins anew"]) from error
    return about


def _as_json(about: Mapping[str, Any]) -> dict[str, Any]:
    read_back: dict[str, Any] = json.loads(json.dumps(dict(about)))
    return read_back


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _on_cpu(value: Any) -> Any:
    """A copy that nothing changes any more: tensors cloned to the CPU, lists and dicts copied."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _on_cpu(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(entry) for entry in value)
    return value


class _Digesting:
    """A stream that takes the SHA-256 of what passes through it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.digest = hashlib.sha256()
        self._stream = stream

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()
