"""The journal of a run: one JSON document a line, appended and never changed.

A record is `{"kind": ..., "time_ms": ..., ...}`; kinds are those that `training.tracking.sender` applies. One write a
record: what was logged before a `kill -9` is in the file, except perhaps for the tail of a line, which readers skip.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

JOURNAL_NAME = "journal.jsonl"

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_\-. /:]")  # what MLflow refuses in names of metrics and parameters


class Journal:
    """Appends records to a file. Nothing raises: a journal that cannot be written warns once and counts.

    Attributes:
        is_new: the file held no record.
        lost_records: records that could not be written.
        last_step: the highest step logged so far, -1 before the first.
        metrics_time_ms: when numbers were logged last.
    """

    def __init__(self, path: Path) -> None:
        """Open or create `path`; OSError if that is impossible."""
        self._path = path
        self._names: dict[str, str] = {}
        self._last_step_of: dict[str, int] = {}
        self.lost_records = 0
        self.metrics_time_ms = 0
        self.is_new = True
        for record, _ in read(path):
            self.is_new = False
            if record["kind"] == "metrics":
                for name in record["values"]:
                    self._last_step_of[name] = max(record["step"], self._last_step_of.get(name, -1))
        self.last_step = max(self._last_step_of.values(), default=-1)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size_bytes = os.fstat(self._file).st_size
        self._torn = size_bytes > 0 and os.pread(self._file, 1, size_bytes - 1) != b"\n"

    def append(self, kind: str, **values: Any) -> None:
        """Add a record; what JSON does not have becomes a string, such as "nan", which `float` reads."""
        record: dict[str, Any] = {"kind": kind, "time_ms": time.time_ns() // 1_000_000, **values}
        if kind == "metrics":
            self.metrics_time_ms = record["time_ms"]
        try:
            line = json.dumps(record, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError):
            line = json.dumps(_plain(record), separators=(",", ":"))
        self._write(line.encode() + b"\n")

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Add numbers of a step; a name whose step was logged already is left out, so a resumed run repeats freely.

        Args:
            values: numbers, NumPy scalars or tensors of one element; anything else is left out.
        """
        new: dict[str, float] = {}
        last = self._last_step_of
        for told, value in values.items():
            name = self._names.get(told) or self._name(told)
            if step <= last.get(name, -1):
                continue
            if type(value) is not float:
                try:
                    value = float(value)
                except (TypeError, ValueError):
                    continue
            new[name] = value
            last[name] = step
        if new:
            self.last_step = max(self.last_step, step)
            self.append("metrics", step=step, values=new)

    def close(self) -> None:
        """Hand the file to the disk and close it."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.fsync(self._file)
            os.close(self._file)
            self._file = -1

    def _name(self, told: str) -> str:
        name = self._names[told] = metric_name(told)
        return name

    def _write(self, line: bytes) -> None:
        data = b"\n" + line if self._torn else line
        try:
            written = os.write(self._file, data)
            self._torn = written < len(data)
            if not self._torn:
                return
            problem = "the disk is full"
        except OSError as error:
            problem = str(error)
        if self.lost_records == 0:
            print(
                f"\nwarning: records of this run cannot be written to {self._path}: {problem}; training goes on",
                file=sys.stderr,
            )
        self.lost_records += 1


def read(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The records from byte `offset` on, each with the offset behind it; broken and unfinished lines are skipped.

    A journal that does not exist is empty.
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return
    with stream:
        stream.seek(offset)
        for line in stream:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("kind"), str):
                yield record, offset


def metric_name(told: str) -> str:
    """A name that MLflow takes: other characters become _, no leading or doubled slash, at most 250 characters."""
    name = _NOT_IN_NAMES.sub("_", str(told))
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:250].rstrip("/") or "_"


def _plain(value: Any) -> Any:
    """Any value as strict JSON: what JSON does not have becomes a string."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    if (
        value is None
        or isinstance(value, (str, bool, int))
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    return str(value)
