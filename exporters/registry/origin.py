"""Where a checkpoint comes from: a directory, or a model in MLflow's registry."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from training.errors import TrackingError
from training.tracking import identity, journal, registry


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint on this machine.

    Attributes:
        directory: where it lies.
        mlflow: run_id, model_name, model_version, alias and tracking_uri (without secrets), as JSON types; None where
            MLflow is not known to have it.
    """

    directory: Path
    mlflow: dict[str, Any] | None


@contextlib.contextmanager
def checkpoint_at(source: str | Path, *, tracking_uri: str | None = None) -> Iterator[CheckpointSource]:
    """A checkpoint as a directory; one out of the registry lies in a temporary one that goes with the block.

    Args:
        source: a directory, models:/NAME@ALIAS or models:/NAME/VERSION.
        tracking_uri: of the MLflow store, as for training; MLFLOW_TRACKING_URI or runs/mlflow.db if None.

    Raises:
        TrackingOptionsError: a URI that cannot be meant.
        TrackingError: no such model, version or alias, no checkpoint in it, or the store cannot be reached.
    """
    if not registry.is_model_uri(str(source)):
        yield CheckpointSource(Path(source), _tracked(Path(source)))
        return
    version = registry.find_version(str(source), uri=tracking_uri)
    with tempfile.TemporaryDirectory(prefix="clotline-model-") as scratch:
        directory = registry.fetch_checkpoint(version, Path(scratch, "checkpoint"))
        yield CheckpointSource(directory, version.origin)


def _tracked(checkpoint: Path) -> dict[str, Any] | None:
    """What the records of the training run say that wrote this checkpoint, if they lie beside it."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, TrackingError):
        manifest = json.loads((checkpoint / "checkpoint.json").read_bytes())
        made_ms = datetime.fromisoformat(manifest["created_utc"]).timestamp() * 1000
        run_dir = checkpoint.resolve().parent
        for directory in reversed(identity.runs_of(run_dir)):
            who = identity.read(directory)
            sent = identity.read_sent(directory, who.uri)
            for record, _ in journal.read(directory / journal.JOURNAL_NAME):
                if (
                    record["kind"] == "model"
                    and (run_dir / record["checkpoint"]).resolve() == checkpoint.resolve()
                    and who.created_ms - 1000 <= made_ms <= record["time_ms"]
                    and sent.mlflow_run_id is not None
                ):
                    return {
                        "run_id": sent.mlflow_run_id,
                        "model_name": who.register if sent.model_version else None,
                        "model_version": sent.model_version,
                        "alias": None,
                        "tracking_uri": who.uri,
                    }
    return None
