"""What MLflow is told of a run. Only the sender and the commands import this: MLflow takes a second or more to load.

Every call may be repeated without harm, since an answer may be lost after the store has done what it was asked for:
the run is found again by our own id, metrics carry the time at which they were logged and are equal then, and the model
is found again by the digest of its checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.errors import TrackingError
from training.tracking.options import redacted, sqlite_path

RUN_ID_TAG = "clotline.run_id"
METRICS_A_CALL = 1000  # MLflow's limits
PARAMS_A_CALL = 100
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000
CALL_TIMEOUT_S = 5
UPLOAD_TIMEOUT_S = 60


class StoreLostError(TrackingError):
    """The store cannot be reached, refuses us, or has no room; to be tried again later."""


class RefusedError(TrackingError):
    """The store will never take this record, or what it names is gone."""


def configure(uri: str) -> None:
    """Set MLflow up for this process: short timeouts and no retries of its own (its default is minutes), no telemetry.

    To be called before MLflow is imported. What a person set in the environment is left as it is.
    """
    defaults = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(CALL_TIMEOUT_S),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the sender repeats, with its own patience
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    path = sqlite_path(uri)
    if path is not None:
        # The experiment "Default" that a new store makes would otherwise get a folder mlruns where we happen to run.
        os.environ.setdefault("_MLFLOW_SERVER_ARTIFACT_ROOT", artifacts_of(path).as_uri())
    os.environ["MLFLOW_TRACKING_URI"] = uri


def artifacts_of(database: Path) -> Path:
    """The folder of the artefacts of a SQLite store: beside it, named after it."""
    return database.with_name(f"{database.stem}-artifacts")


def connect(uri: str) -> Any:
    """A client of the store; nothing is asked yet, except that a SQLite store is created or opened.

    Raises:
        StoreLostError: it cannot be opened.
    """
    configure(uri)
    import mlflow
    from mlflow import MlflowClient

    try:
        mlflow.set_tracking_uri(uri)
        return MlflowClient(tracking_uri=uri)
    except Exception as error:
        raise as_our_error(error, uri) from error


class StoredRun:
    """A run in MLflow.

    Attributes:
        mlflow_run_id: MLflow's own id.
        experiment_id: MLflow's.
    """

    def __init__(self, client: Any, mlflow_run_id: str, experiment_id: str) -> None:
        self.client = client
        self.mlflow_run_id = mlflow_run_id
        self.experiment_id = experiment_id

    @classmethod
    def find_or_create(
        cls,
        client: Any,
        *,
        run_id: str,
        name: str,
        experiment: str,
        uri: str,
        time_ms: int,
        known: str | None,
    ) -> tuple[StoredRun, bool]:
        """The run with our id, made if there is none; True if it is not the one `known`, so that all is to be sent.

        Raises:
            StoreLostError: as every method here; also if the run or the experiment was deleted in MLflow.
        """
        experiment_id = experiment_id_of(client, experiment, uri)
        if known is not None and (run := _get_run(client, known)) is not None:
            _refuse_deleted(run)
            return cls(client, known, run.info.experiment_id), False
        query = f"tags.`{RUN_ID_TAG}` = '{run_id}'"
        found = client.search_runs(
            [experiment_id], query, run_view_type=3, order_by=["attributes.start_time"]
        )
        if found:
            _refuse_deleted(found[0])
            return cls(client, found[0].info.run_id, experiment_id), True
        run = client.create_run(
            experiment_id,
            start_time=time_ms,
            run_name=name,
            tags={RUN_ID_TAG: run_id, "mlflow.runName": name},
        )
        return cls(client, run.info.run_id, experiment_id), True

    def log_metrics(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Send records of kind metrics, METRICS_A_CALL numbers a call."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), record["time_ms"], record["step"])
            for record in records
            for name, value in record["values"].items()
        ]
        for first in range(0, len(metrics), METRICS_A_CALL):
            self.client.log_batch(self.mlflow_run_id, metrics=metrics[first : first + METRICS_A_CALL])

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Send nested values as parameters with dotted names."""
        from mlflow.entities import Param

        params = [Param(name, value[:PARAM_CHARACTERS]) for name, value in flattened(values)]
        for first in range(0, len(params), PARAMS_A_CALL):
            self.client.log_batch(self.mlflow_run_id, params=params[first : first + PARAMS_A_CALL])

    def set_tags(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(name, str(value)[:TAG_CHARACTERS]) for name, value in values.items()]
        self.client.log_batch(self.mlflow_run_id, tags=tags)

    def log_dataset(self, data: Mapping[str, Any]) -> None:
        """Make `data` the run's dataset, with its fingerprint as digest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        fingerprint = str(data.get("fingerprint", "unknown"))
        source = str(data.get("path") or data.get("source") or "unknown")
        numbers = {name: value for name, value in data.items() if isinstance(value, (int, float))}
        dataset = Dataset(
            name=Path(source).name or "data",
            digest=fingerprint[:36],
            source_type="local",
            source=json.dumps({"uri": source}),
            profile=json.dumps({"fingerprint": fingerprint, **numbers}),
        )
        tags = [InputTag("mlflow.data.context", "training")]
        self.client.log_inputs(self.mlflow_run_id, [DatasetInput(dataset, tags)])
        self.set_tags({"clotline.data_fingerprint": fingerprint})

    def log_json(self, value: Any, name: str) -> None:
        """Keep `value` as the artefact `name`."""
        text = json.dumps(value, indent=2, ensure_ascii=False)
        with uploading():
            self.client.log_text(self.mlflow_run_id, text + "\n", name)

    def log_file(self, path: Path, folder: str) -> None:
        """Keep a file, or all files of a directory, as artefacts in `folder`."""
        with uploading():
            if path.is_dir():
                self.client.log_artifacts(self.mlflow_run_id, str(path), f"{folder}/{path.name}".lstrip("/"))
            else:
                self.client.log_artifact(self.mlflow_run_id, str(path), folder or None)

    def resume(self) -> None:
        self.client.update_run(self.mlflow_run_id, status="RUNNING")

    def end(self, status: str, time_ms: int) -> None:
        self.client.set_terminated(self.mlflow_run_id, status=status, end_time=time_ms)


class uploading:
    """While files travel, a call may take UPLOAD_TIMEOUT_S: the server answers when it has stored all of it."""

    def __enter__(self) -> None:
        self._before = os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", str(CALL_TIMEOUT_S))
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(UPLOAD_TIMEOUT_S, int(self._before)))

    def __exit__(self, *_: object) -> None:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = self._before


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names with dots and values as text: strings as they are, anything else as JSON."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)


def as_our_error(error: BaseException, uri: str) -> TrackingError:
    """RefusedError for what will never be taken, StoreLostError for all else."""
    if isinstance(error, TrackingError):
        return error
    text = " ".join(str(error).split())
    code = getattr(error, "error_code", "")
    where = redacted(uri)
    if (
        code in ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED")
        or " 401 " in text
        or " 403 " in text
    ):
        return StoreLostError(
            f"{where} refuses these credentials; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
            f"(or MLFLOW_TRACKING_TOKEN): {_short(text)}"
        )
    if code in ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
        return RefusedError(_short(text))
    if "timed out" in text or "timeout" in text:
        return StoreLostError(f"{where} does not answer")
    if "Connection refused" in text or "Failed to establish" in text or "Name or service" in text:
        return StoreLostError(f"{where} cannot be reached")
    return StoreLostError(f"{where} fails: {_short(text)}")


def experiment_id_of(client: Any, name: str, uri: str) -> str:
    """MLflow's id of the experiment of that name, made if there is none; StoreLostError if it was deleted."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        path = sqlite_path(uri)
        location = artifacts_of(path).as_uri() if path is not None else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except Exception:  # another run may have been faster
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        raise StoreLostError(
            f"the experiment {name!r} was deleted in MLflow: restore it there (mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}) or name another with --experiment"
        )
    return str(experiment.experiment_id)


def _get_run(client: Any, mlflow_run_id: str) -> Any:
    try:
        return client.get_run(mlflow_run_id)
    except Exception as error:
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _refuse_deleted(run: Any) -> None:
    if run.info.lifecycle_stage == "deleted":
        raise StoreLostError(
            f"the run {run.info.run_id} was deleted in MLflow; restore it there (mlflow runs restore --run-id ...)"
        )


def _short(text: str) -> str:
    return text if len(text) <= 300 else text[:297] + "..."
