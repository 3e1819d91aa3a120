"""Who a tracked run is, and how much of its journal has been sent: two small files beside the journal.

run.json    written by the training process: our id, names, where to send
sent.json   written by the sender alone: MLflow's id of the run, offsets up to which the journals were sent
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

from training.atomic_file import write_text
from training.errors import TrackingError
from training.tracking.journal import JOURNAL_NAME
from training.tracking.journal import read as read_journal
from training.tracking.options import redacted

FORMAT = "clotline.tracking"
VERSION = 1
IDENTITY_NAME = "run.json"
SENT_NAME = "sent.json"
SYSTEM_NAME = "system.jsonl"  # the sender's own journal, of system metrics
FILES = (JOURNAL_NAME, SYSTEM_NAME)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """run.json.

    Attributes:
        run_id: our own id, the tag clotline.run_id in MLflow, by which the run is found again.
        uri: of the MLflow store, *** in place of a password.
        register: the name under which the checkpoint is registered, or None.
    """

    run_id: str
    run_name: str
    uri: str
    experiment: str
    register: str | None
    created_utc: str

    @property
    def created_ms(self) -> int:
        """When the run began, in milliseconds since 1970."""
        return round(datetime.datetime.fromisoformat(self.created_utc).timestamp() * 1000)

    def replaced(self, **values: Any) -> Identity:
        return dataclasses.replace(self, **values)


@dataclasses.dataclass
class Sent:
    """sent.json.

    Attributes:
        uri: the store that all this is about; of another one nothing is known.
        offsets: bytes of each of FILES that the store has.
        refused: records that the store or a missing file made impossible to send; they are left out.
        trouble: why nothing can be sent at present.
        model_version: in the registry.
    """

    uri: str
    mlflow_run_id: str | None = None
    offsets: dict[str, int] = dataclasses.field(default_factory=dict)
    refused: int = 0
    trouble: str | None = None
    model_version: str | None = None


def runs_of(run_dir: Path) -> list[Path]:
    """The folders of all runs that were tracked in `run_dir`, oldest first."""
    return sorted(path.parent for path in (run_dir / "tracking").glob(f"*/{IDENTITY_NAME}"))


def read(directory: Path) -> Identity:
    """run.json; TrackingError if it is missing, damaged or of another version."""
    path = directory / IDENTITY_NAME
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TrackingError(f"{path} cannot be read: {error}") from error
    if (
        not isinstance(values, dict)
        or values.pop("format", None) != FORMAT
        or values.pop("version", None) != VERSION
    ):
        raise TrackingError(f"{path} is not of format {FORMAT!r}, version {VERSION}")
    try:
        return Identity(**values)
    except TypeError as error:
        raise TrackingError(f"{path} is damaged: {error}") from error


def write(directory: Path, identity: Identity) -> None:
    """Write run.json aside and rename it."""
    values = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(identity)}
    write_text(directory / IDENTITY_NAME, json.dumps(values, indent=2) + "\n")


def read_sent(directory: Path, uri: str) -> Sent:
    """sent.json, or a fresh one where there is none that can be read, or it is about another store."""
    try:
        values = json.loads((directory / SENT_NAME).read_bytes())
        sent = Sent(**values)
    except (OSError, ValueError, TypeError):
        return Sent(uri=uri_key(uri))
    return sent if sent.uri == uri_key(uri) else Sent(uri=uri_key(uri))


def write_sent(directory: Path, sent: Sent) -> None:
    """Write sent.json aside and rename it; OSError if the disk is full."""
    write_text(directory / SENT_NAME, json.dumps(dataclasses.asdict(sent), indent=2) + "\n")


def unsent_records(directory: Path, sent: Sent) -> int:
    """Records of all journals that were not sent."""
    return sum(1 for name in FILES for _ in read_journal(directory / name, sent.offsets.get(name, 0)))


def uri_key(uri: str) -> str:
    """What a store is known by in sent.json: its URI without the password."""
    return redacted(uri)


def is_redacted(uri: str) -> bool:
    """Whether a password was taken out of the URI."""
    return ":***@" in uri
