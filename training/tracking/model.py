"""A Checkpoint as a model of MLflow 3: with signature and input example, and a version in the registry.

The model is of the flavour python_function, from code (`training.tracking.served_model`); the Checkpoint directory lies
inside it as artifacts/checkpoint, safetensors and all. Nothing in it is a pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slides.decode import decode_tile
from slides.errors import SlidesError
from slides.spec import ModelSpec
from training.tracking.journal import metric_name
from training.tracking.store import RefusedError, StoredRun, uploading

MODEL_NAME = "classifier"
CHALLENGER = "challenger"
CHECKPOINT_IN_MODEL = "artifacts/checkpoint"
SCRATCH_PREFIX = ".model-"
DIGEST_TAG = "clotline.checkpoint_sha256"
MANIFEST_NAME = "checkpoint.json"  # as training.checkpoint has it, whose import loads torch

ROOT = Path(__file__).resolve().parents[2]
CODE = ("slides", "training")
REQUIREMENTS = (
    *("torch", "torchvision", "accelerate", "safetensors", "pydantic", "scikit-learn", "numpy"),
    *(
        "opencv-python-headless",
        "simplejpeg",
        "pillow",
        "openslide-python",
        "openslide-bin",
        "tifffile",
        "tqdm",
    ),
)


def log_checkpoint(
    run: StoredRun, directory: Path, record: Mapping[str, Any], *, register: str | None, scratch: Path
) -> str | None:
    """Make a Checkpoint the model of a run; what is there already, whole, is left as it is.

    Args:
        record: of kind model: the scores that belong to the model, and when they were logged.
        register: name in the registry; the version made gets the alias challenger.
        scratch: a folder with room for two copies of the checkpoint, in folders SCRATCH_PREFIX..., removed at the end.

    Returns:
        The version in the registry, or None.

    Raises:
        RefusedError: the checkpoint is gone or damaged.
    """
    manifest, digest = _manifest(directory)
    model_id = _ready_model(run, digest) or _upload(run, directory, manifest, digest, record, scratch)
    return _register(run, register, model_id, manifest) if register else None


def signature(manifest: Mapping[str, Any]) -> Any:
    """uint8 images [N, S, S, 3], red-green-blue, of the network's input size, to FP32 probabilities [N, K].

    For a slide model the N images are the tiles of one slide, and the answer is [1, K].
    """
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    spec = ModelSpec.from_dict(manifest["spec"])
    size_px, classes = spec.input_size_px, len(spec.class_names)
    rows = 1 if manifest.get("kind") == "slide" else -1
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, size_px, size_px, 3))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (rows, classes))]),
    )


def _manifest(directory: Path) -> tuple[dict[str, Any], str]:
    try:
        data = (directory / MANIFEST_NAME).read_bytes()
        manifest = json.loads(data)
        ModelSpec.from_dict(manifest["spec"])
    except (OSError, ValueError, KeyError, TypeError, SlidesError) as error:
        raise RefusedError(f"{directory} is no checkpoint that can be kept as a model: {error}") from error
    return manifest, hashlib.sha256(data).hexdigest()


def _ready_model(run: StoredRun, digest: str) -> str | None:
    """The id of this run's model of that digest; one whose upload broke off is removed."""
    query = f"source_run_id = '{run.mlflow_run_id}'"
    for found in run.client.search_logged_models([run.experiment_id], filter_string=query):
        if found.tags.get(DIGEST_TAG) == digest:
            if str(found.status) == "READY":
                return str(found.model_id)
            run.client.delete_logged_model(found.model_id)
    return None


def _upload(
    run: StoredRun,
    directory: Path,
    manifest: Mapping[str, Any],
    digest: str,
    record: Mapping[str, Any],
    scratch: Path,
) -> str:
    from mlflow.entities import LoggedModelOutput, Metric

    model_of_run = run.client.create_logged_model(
        run.experiment_id,
        name=MODEL_NAME,
        source_run_id=run.mlflow_run_id,
        tags={DIGEST_TAG: digest},
        params={"architecture": str(manifest.get("architecture")), "kind": manifest.get("kind", "tile")},
        model_type="classifier",
    )
    model_id = model_of_run.model_id
    with _saved(directory, manifest, run, model_id, scratch) as folder, uploading():
        run.client.log_model_artifacts(model_id, str(folder))
    run.client.finalize_logged_model(model_id, "READY")
    run.client.log_outputs(run.mlflow_run_id, [LoggedModelOutput(model_id, step=record.get("step", 0))])
    # The run has these numbers already, of the same time and step: this adds them to the model and not twice to the run.
    time_ms, step = record.get("metrics_time_ms", record["time_ms"]), record.get("step", 0)
    metrics = [
        Metric(metric_name(name), float(value), time_ms, step, model_id=model_id, run_id=run.mlflow_run_id)
        for name, value in record.get("metrics", {}).items()
    ]
    if metrics:
        run.client.log_batch(run.mlflow_run_id, metrics=metrics)
    return str(model_id)


@contextlib.contextmanager
def _saved(
    directory: Path, manifest: Mapping[str, Any], run: StoredRun, model_id: str, scratch: Path
) -> Iterator[Path]:
    """The model in a temporary folder."""
    import mlflow.pyfunc
    from mlflow.models import Model

    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=scratch.resolve()) as temporary:
        staged = Path(temporary)
        # MLflow keeps an artefact under the name of its folder, and follows no links.
        checkpoint = shutil.copytree(directory, staged / Path(CHECKPOINT_IN_MODEL).name)
        mlflow.pyfunc.save_model(
            path=str(staged / "model"),
            mlflow_model=Model(run_id=run.mlflow_run_id, model_id=model_id, model_uuid=model_id),
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"checkpoint": str(checkpoint)},
            code_paths=[str(ROOT / package) for package in CODE],
            signature=signature(manifest),
            input_example=_example(directory, manifest),
            pip_requirements=[*_requirements()],
        )
        yield staged / "model"


def _example(directory: Path, manifest: Mapping[str, Any]) -> Any:
    """uint8 [1, S, S, 3]: the first golden tile; black where there is none."""
    import numpy as np

    size_px = int(manifest["spec"]["input_size_px"])
    names = [entry["file"] for entry in manifest.get("golden_tiles", [])]
    names += [name for entry in manifest.get("golden_bags", []) for name in entry["files"]]
    for name in names[:1]:
        return decode_tile((directory / name).read_bytes(), size_px)[None]
    return np.zeros((1, size_px, size_px, 3), np.uint8)


def _requirements() -> Iterator[str]:
    for package in REQUIREMENTS:
        try:
            yield f"{package}=={importlib.metadata.version(package).partition('+')[0]}"
        except importlib.metadata.PackageNotFoundError:
            continue


def _register(run: StoredRun, name: str, model_id: str, manifest: Mapping[str, Any]) -> str:
    source = f"models:/{model_id}"
    for version in run.client.search_model_versions(f"name = '{name}'"):
        if version.source == source or version.model_id == model_id:
            return str(version.version)
    try:
        run.client.create_registered_model(name)
    except Exception as error:
        if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
            raise
    version = run.client.create_model_version(
        name,
        source,
        run_id=run.mlflow_run_id,
        model_id=model_id,
        tags={
            "clotline.architecture": str(manifest.get("architecture")),
            "clotline.git_commit": str(manifest.get("git_commit", "unknown")),
            "clotline.data_fingerprint": str(manifest.get("data", {}).get("fingerprint", "unknown")),
        },
    )
    run.client.set_registered_model_alias(name, CHALLENGER, version.version)
    return str(version.version)
