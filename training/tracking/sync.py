"""python -m training sync RUN [--tracking-uri URI]

Send to MLflow what a training run could not send: RUN is the folder that `--out` named. What MLflow has already is not
sent twice, and the run keeps its id. Another store (--tracking-uri) gets the whole run. The exit code is 1 if the
store cannot be reached; everything is kept then, and the command can be repeated.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from training.errors import TrackingError
from training.tracking import identity
from training.tracking.options import prepare_store, redacted, resolve_uri


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and --tracking-uri."""
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="folder of the run, as --out named it")
    parser.add_argument("--tracking-uri", metavar="URI", help="another MLflow store than the one of the run")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Send all runs that were tracked in the folder, oldest first.

    Raises:
        TrackingError: nothing was tracked there, or a run is being sent by its training process now.
        TrackingOptionsError: the URI cannot be meant.
    """
    told = None if options.tracking_uri is None else resolve_uri(options.tracking_uri)
    directories = identity.runs_of(options.run_dir)
    if not directories:
        raise TrackingError(
            f"no run was tracked with MLflow in {options.run_dir}: there is no "
            f"{Path('tracking', '*', identity.IDENTITY_NAME)}; name the folder that training was given as --out"
        )
    runs = [_sent(directory, told) for directory in directories]
    lost = [entry["trouble"] for entry in runs if entry["trouble"]]
    for trouble in dict.fromkeys(lost):
        print(f"error: {trouble}", file=sys.stderr)
    return {
        "runs": runs,
        "unsent_records": sum(e["unsent_records"] for e in runs),
        "exit_code": int(bool(lost)),
    }


def _sent(directory: Path, told: str | None) -> dict[str, Any]:
    from training.tracking import sender, store

    who = identity.read(directory)
    uri = told or who.uri
    if identity.is_redacted(uri):
        uri = resolve_uri(None)
        if redacted(uri) != who.uri:
            raise TrackingError(
                f"the password of {who.uri} is not kept with the run; give the whole URI with --tracking-uri, or in "
                "MLFLOW_TRACKING_URI"
            )
    prepare_store(uri)
    one = sender.Sender(directory, uri, warn=lambda text: print(f"warning: {text}", file=sys.stderr))
    try:
        count = one.send()
        one.end_as_killed()  # no training process sends this run any more
        trouble = None
    except store.StoreLostError as error:
        count, trouble = 0, str(error)
    finally:
        one.close()
    return {
        "run_id": who.run_id,
        "mlflow_run_id": one.sent.mlflow_run_id,
        "uri": redacted(uri),
        "sent_records": count,
        "unsent_records": identity.unsent_records(directory, one.sent),
        "refused_records": one.sent.refused,
        "model_version": one.sent.model_version,
        "trouble": trouble,
    }
