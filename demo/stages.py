"""Running the path's commands one after the other: what runs is said, timed, and logged to a file each."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from demo.errors import StageFailed
from serving.processes import interrupt

ROOT = Path(__file__).resolve().parent.parent
HEARTBEAT_S = 15.0
STOPPING_S = 40.0
TAIL_LINES = 15


@dataclasses.dataclass(frozen=True)
class Finished:
    """A stage that is over.

    Attributes:
        name: short name, also of its log file.
        title: what it did, for people.
        command: as it could be typed, "" where no command was run.
        wall_s: seconds from its start to its end (of a server: until it was ready).
    """

    name: str
    title: str
    command: str
    wall_s: float


class Stages:
    """Runs stages; knows where logs go and remembers how long each took.

    Args:
        logs: existing folder for one log file a stage.
        count: how many stages there will be, for "[2/7]".
        later: folder -> where it will be moved at the end; commands are shown with the latter, so that they
            can be typed afterwards.
    """

    def __init__(self, logs: Path, count: int, later: Mapping[Path, Path] | None = None) -> None:
        self._later = dict(later or {})
        self._logs = logs
        self._count = count
        self.finished: list[Finished] = []

    def run(self, name: str, title: str, module: list[str | Path]) -> list[dict[str, Any]]:
        """Run `python -m MODULE...` to its end.

        Returns:
            the JSON documents among the lines of its standard output, in order; the last one is the result.

        Raises:
            StageFailed: its exit code is not 0, or its last line is no JSON document.
        """
        log = self._log(name)
        with self.timed(name, title, self._typed(module)), log.open("wb") as sink:
            process = _start(module, sink)
            lines: list[str] = []
            reader = threading.Thread(target=_copy_lines, args=(process, sink, lines), daemon=True)
            reader.start()
            try:
                self._wait(process, log)
            finally:
                interrupt(process, STOPPING_S)
                reader.join(5)
            if process.returncode != 0:
                raise StageFailed(title, f"exit code {process.returncode}", log, reason_in(log))
            documents = [document for line in lines if (document := _document(line)) is not None]
            if not lines or _document(lines[-1]) is None:
                raise StageFailed(title, "its last line is no JSON document", log, reason_in(log))
        return documents

    @contextlib.contextmanager
    def serve(
        self, name: str, title: str, module: list[str | Path], ready_s: float
    ) -> Iterator[dict[str, Any]]:
        """Keep `python -m MODULE...` running in the background; the stage is over when it printed its JSON
        line.

        Yields:
            the document of that line.

        Raises:
            StageFailed: it ended, or said nothing within `ready_s`; or it did not stop gracefully at the end.
        """
        log = self._log(name)
        with log.open("wb") as sink:
            process = _start(module, sink)
            try:
                with self.timed(name, title, self._typed(module)):
                    lines: list[str] = []
                    threading.Thread(target=_copy_lines, args=(process, sink, lines), daemon=True).start()
                    document = self._await_line(process, lines, log, title, ready_s)
                yield document
            finally:
                interrupt(process, STOPPING_S)
        if process.returncode != 0:
            raise StageFailed("stop the server", f"exit code {process.returncode}", log, reason_in(log))

    @contextlib.contextmanager
    def timed(self, name: str, title: str, command: str = "") -> Iterator[None]:
        """A stage of our own doing: said, timed, remembered if it succeeds."""
        say(f"[{len(self.finished) + 1}/{self._count}] {title}")
        if command:
            say(f"      $ {command}")
        started_s = time.monotonic()
        yield
        wall_s = time.monotonic() - started_s
        self.finished.append(Finished(name, title, command, wall_s))
        say(f"      done in {wall_s:.1f} s")

    def _typed(self, module: list[str | Path]) -> str:
        text = typed(module)
        for folder, place in self._later.items():
            text = text.replace(_relative(str(folder)), _relative(str(place)))
        return text

    def _log(self, name: str) -> Path:
        return self._logs / f"{len(self.finished) + 1:02d}-{name}.log"

    def _wait(self, process: subprocess.Popen[bytes], log: Path) -> None:
        started_s = time.monotonic()
        while True:
            try:
                process.wait(timeout=HEARTBEAT_S)
                return
            except subprocess.TimeoutExpired:
                last = "".join(tail_of(log)[-1:])
                say(f"      {time.monotonic() - started_s:4.0f} s  {last[:100]}")

    def _await_line(
        self, process: subprocess.Popen[bytes], lines: list[str], log: Path, title: str, ready_s: float
    ) -> dict[str, Any]:
        started_s = time.monotonic()
        while True:
            ended = process.poll() is not None
            for line in list(lines):
                if (document := _document(line)) is not None:
                    return document
            if ended:
                raise StageFailed(title, f"ended with exit code {process.returncode}", log, reason_in(log))
            if time.monotonic() - started_s > ready_s:
                raise StageFailed(title, f"not ready within {ready_s:.0f} s", log, reason_in(log))
            time.sleep(0.05)


def say(line: str) -> None:
    """A line for the person who watches; standard output is for the result alone."""
    print(line, file=sys.stderr, flush=True)


def tail_of(log: Path) -> list[str]:
    """The last lines of a log, a progress bar counted as its last state."""
    text = log.read_bytes().decode("utf-8", errors="replace")
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return [line for line in lines if line][-TAIL_LINES:]


def reason_in(log: Path) -> list[str]:
    """What a failed command said: its last `error: ...` and what belongs to it, else the last lines of its
    log.

    (`accelerate launch` adds a traceback of its own to the error of what it launched.)
    """
    lines = log.read_bytes().decode("utf-8", errors="replace").replace("\r", "\n").split("\n")
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if not starts:
        return tail_of(log)
    told = itertools.takewhile(lambda line: not line.startswith("Traceback "), lines[starts[-1] :])
    return [line.rstrip() for line in told if line.strip()][:TAIL_LINES]


def _start(module: list[str | Path], sink: IO[bytes]) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, module)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=sink,
        # Ctrl-C reaches this process, which then stops the child: otherwise both would act on it at once.
        start_new_session=True,
    )


def _copy_lines(process: subprocess.Popen[bytes], sink: IO[bytes], lines: list[str]) -> None:
    if process.stdout is None:
        return
    for line in process.stdout:
        sink.write(line)
        sink.flush()
        lines.append(line.decode("utf-8", errors="replace").strip())


def _document(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        document = json.loads(line)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def typed(module: list[str | Path]) -> str:
    """The command as a person would type it from the checkout."""
    words = [str(word) for word in module]
    if words[0] == "accelerate.commands.launch":
        words = ["accelerate", "launch", *words[1:]]
    else:
        words = ["python", "-m", *words]
    text = shlex.join(_relative(word) for word in words)
    return text if len(text) <= 260 else f"{text[:240]} ... ({len(words)} words)"


def _relative(word: str) -> str:
    return os.path.relpath(word, ROOT) if word.startswith(f"{ROOT}{os.sep}") else word
