"""Releases in MLflow's registry: a version of a model that holds the release, its figures as tags.

The version's source is a model of MLflow 3 (`models:/<id>`) with the release in its folder `release`, so that SQLite stores and
servers are written to and read from in the same way. A release is known by its `release_id`: registering it again finds it again.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.errors import ReleaseError, ReleaseExistsError
from training.errors import TrackingError
from training.tracking import registry, store
from training.tracking.options import DEFAULT_EXPERIMENT, check_model_name, redacted

if TYPE_CHECKING:
    from exporters.release_manifest import Manifest

FOLDER = "release"
RELEASE_TAG = "clotline.release_id"
MANIFEST_TAG = "clotline.manifest_sha256"
ARTIFACTS_TAG = "clotline.artifacts"
ORIGIN_TAG = "clotline.exported_from"
WHOLE, MANIFEST_ONLY = "release", "manifest"


def register_release(
    release: Path | str,
    name: str,
    *,
    tracking_uri: str | None = None,
    whole: bool = True,
    link: bool = True,
) -> dict[str, Any]:
    """Make a release a version of the model `name`; one that is there already is left as it is.

    Args:
        release: its directory; every file is checked first.
        name: of the model; made if the registry has none of that name.
        tracking_uri: of the MLflow store; as `training.tracking.options.resolve_uri`.
        whole: upload all of it; otherwise the manifest, the model card and the plots.
        link: to the run that its checkpoint came from, if that is in this store.

    Returns:
        model_name, model_version, release_id, run_id, artifacts ("release" or "manifest"), tracking_uri and created
        (False where it was registered before), as JSON types.

    Raises:
        ReleaseError: the release is damaged.
        TrackingOptionsError: a name that the registry cannot have.
        TrackingError: the store cannot be reached, or the version that the release was exported from is gone.
    """
    from exporters.verify import verify

    check_model_name(name)
    release = Path(release)
    manifest = verify(release)
    client, uri = registry.client_of(tracking_uri)
    try:
        number = _registered(client, name, manifest.release_id)
        created = number is None
        run_id = None
        if number is None:
            experiment_id, run_id = _run_of(client, uri, manifest, link=link)
            model_id = _uploaded(client, experiment_id, run_id, release, manifest, whole=whole)
            number = _version(client, name, model_id, run_id, _tags(release, manifest, whole=whole))
        version = client.get_model_version(name, number)
    except Exception as error:
        raise registry.registry_error(error, uri, f"{name}, release {manifest.release_id}") from error
    return {
        "model_name": name,
        "model_version": number,
        "release_id": manifest.release_id,
        "run_id": version.run_id or run_id,
        "artifacts": version.tags.get(ARTIFACTS_TAG),
        "tracking_uri": redacted(uri),
        "created": created,
    }


def fetch_release(
    model_uri: str,
    *,
    directory: Path | str | None = None,
    below: Path | str | None = None,
    tracking_uri: str | None = None,
) -> dict[str, Any]:
    """Copy a registered release to `directory`, which must not exist, or to `below`/<release_id>, where it may be already.

    Every file is checked before the directory gets its name.

    Returns:
        release (its directory), release_id, model_name, model_version, alias and changed, as JSON types.

    Raises:
        TrackingOptionsError: the URI names no model.
        TrackingError: no such model, version or alias, no whole release in it, or the store cannot be reached.
        ReleaseExistsError: `directory` exists.
        ReleaseError: what came is damaged, or what is there already is.
    """
    from exporters.verify import verify

    if (directory is None) == (below is None):
        raise ValueError("give either a directory or the one to put it below")
    if directory is not None and Path(directory).exists():
        raise ReleaseExistsError(f"{directory} exists already; name another directory for {model_uri}.")
    version = registry.find_version(model_uri, uri=tracking_uri)
    release_id = version.tags.get(RELEASE_TAG)
    if release_id is None:
        raise TrackingError(
            f"{version.told} is no release; export it, and register what comes of it: python -m exporters register RELEASE "
            f"--name {version.name}"
        )
    if version.tags.get(ARTIFACTS_TAG) != WHOLE:
        raise TrackingError(
            f"{version.told} was registered with --manifest-only: the registry does not hold the release {release_id}. Copy it from "
            "where it was exported to."
        )
    target = Path(directory) if directory is not None else Path(str(below), release_id)
    changed = not target.exists()
    if changed:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.partial-", dir=target.parent) as scratch:
            fetched = registry.fetch_folder(version, FOLDER, "release.json", Path(scratch, FOLDER))
            found = verify(fetched).release_id
            if found != release_id:
                raise ReleaseError(
                    f"{version.told} holds the release {found}, not {release_id}. Register it again."
                )
            os.rename(fetched, target)
    elif (found := verify(target).release_id) != release_id:
        raise ReleaseError(
            f"{target} is the release {found}, not {release_id}. Delete it, or name another directory."
        )
    return {
        "release": str(target),
        "release_id": release_id,
        "model_name": version.name,
        "model_version": version.number,
        "alias": version.alias,
        "changed": changed,
    }


def _registered(client: Any, name: str, release_id: str) -> str | None:
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get(RELEASE_TAG) == release_id:
            return str(version.version)
    return None


def _run_of(client: Any, uri: str, manifest: Manifest, *, link: bool) -> tuple[str, str | None]:
    """Experiment and run that the release belongs to; a run only where its origin is in this very store."""
    origin = manifest.mlflow if link else None
    if origin is None or origin.get("tracking_uri") != redacted(uri) or not origin.get("run_id"):
        return store.experiment_id_of(client, DEFAULT_EXPERIMENT, uri), None
    try:
        if origin.get("model_name") and origin.get("model_version"):
            client.get_model_version(origin["model_name"], str(origin["model_version"]))
        run = client.get_run(origin["run_id"])
        if run.info.lifecycle_stage == "deleted":
            raise store.RefusedError(f"the run {run.info.run_id} was deleted")
    except Exception as error:
        ours = store.as_our_error(error, uri)
        if not isinstance(ours, store.RefusedError):
            raise ours from error
        raise TrackingError(
            f"what the release was exported from, {_origin_in_words(origin)}, is no longer in {redacted(uri)}; register it without a "
            f"link to it with --no-link ({ours})"
        ) from error
    return str(run.info.experiment_id), str(run.info.run_id)


def _origin_in_words(origin: Mapping[str, Any]) -> str:
    if origin.get("model_name") and origin.get("model_version"):
        return f"models:/{origin['model_name']}/{origin['model_version']}"
    return f"run {origin.get('run_id')}"


def _uploaded(
    client: Any, experiment_id: str, run_id: str | None, release: Path, manifest: Manifest, *, whole: bool
) -> str:
    """MLflow's id of the model that holds the release; one whose upload broke off is removed."""
    wanted = {RELEASE_TAG: manifest.release_id, ARTIFACTS_TAG: WHOLE if whole else MANIFEST_ONLY}
    for found in client.search_logged_models([experiment_id], filter_string="name = 'release'"):
        if {key: found.tags.get(key) for key in wanted} == wanted:
            if str(found.status) == "READY" and found.source_run_id == run_id:
                return str(found.model_id)
            if str(found.status) != "READY":
                client.delete_logged_model(found.model_id)
    model = client.create_logged_model(
        experiment_id, name="release", source_run_id=run_id, tags=wanted, model_type="release"
    )
    with tempfile.TemporaryDirectory(prefix="clotline-register-") as scratch, store.uploading():
        folder = release
        if not whole:
            folder = Path(scratch, FOLDER)
            folder.mkdir()
            for name in ("release.json", "MODEL_CARD.md"):
                shutil.copy2(release / name, folder / name)
            if (release / "plots").is_dir():
                shutil.copytree(release / "plots", folder / "plots")
        client.log_model_artifacts(model.model_id, str(folder), FOLDER)
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def _version(client: Any, name: str, model_id: str, run_id: str | None, tags: Mapping[str, str]) -> str:
    try:
        client.create_registered_model(name)
    except Exception as error:
        if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        name,
        f"models:/{model_id}",
        run_id=run_id,
        model_id=model_id,
        tags=dict(tags),
        await_creation_for=0,
    )
    return str(version.version)


def _tags(release: Path, manifest: Manifest, *, whole: bool) -> dict[str, str]:
    """What the registry shows of a release without opening it."""
    digest = json.loads((release / "release.json").read_bytes())["sha256"]
    tags = {
        RELEASE_TAG: manifest.release_id,
        MANIFEST_TAG: digest,
        ARTIFACTS_TAG: WHOLE if whole else MANIFEST_ONLY,
        "clotline.kind": manifest.kind,
        "clotline.formats": ",".join(manifest.formats),
        "clotline.classifiers": ",".join(manifest.classifiers),
        "clotline.git_commit": manifest.git_commit,
        "clotline.metrics": json.dumps(manifest.checkpoint.get("metrics", {}), sort_keys=True),
    }
    data = manifest.checkpoint.get("data") or {}
    if data.get("fingerprint"):
        tags["clotline.data_fingerprint"] = str(data["fingerprint"])
    if manifest.mlflow is not None:
        tags[ORIGIN_TAG] = _origin_in_words(manifest.mlflow)
        tags["clotline.exported_from_store"] = str(manifest.mlflow.get("tracking_uri"))
    for name, entry in manifest.formats.items():
        tags[f"clotline.{name}.status"] = entry.status
        figures = entry.parity.in_process
        if figures is not None and "max_abs_diff" in figures:
            tags[f"clotline.{name}.max_abs_diff"] = f"{figures['max_abs_diff']:.3g}"
        for protocol, served in (entry.parity.served or {}).items():
            if isinstance(served, dict) and "max_abs_diff" in served:
                tags[f"clotline.{name}.max_abs_diff_{protocol}"] = f"{served['max_abs_diff']:.3g}"
        if entry.speed is not None and entry.speed.get("ratio") is not None:
            tags[f"clotline.{name}.times_fp32"] = f"{entry.speed['ratio']:.3g}"
    return tags
