"""MLflow's model registry: aliases that move only by command, and the way from a model's name to its Checkpoint."""

from __future__ import annotations

import dataclasses
import datetime
import getpass
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.errors import OutputExistsError, TrackingError, TrackingOptionsError
from training.tracking import store
from training.tracking.model import CHECKPOINT_IN_MODEL
from training.tracking.options import check_alias, check_model_name, prepare_store, redacted, resolve_uri

_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


@dataclasses.dataclass(frozen=True)
class RegisteredVersion:
    """A version of a model in the registry.

    Attributes:
        number: of the version.
        alias: by which it was asked for, or None.
        run_id: MLflow's id of the run that it came from, or None.
        uri: of the store, as MLflow takes it; it may hold a password.
    """

    name: str
    number: str
    alias: str | None
    run_id: str | None
    tags: Mapping[str, str]
    uri: str

    @property
    def told(self) -> str:
        """As one says it: models:/clotline@champion (version 3)."""
        return (
            f"models:/{self.name}@{self.alias} (version {self.number})"
            if self.alias
            else f"models:/{self.name}/{self.number}"
        )

    @property
    def origin(self) -> dict[str, Any]:
        """JSON types, without secrets: run_id, model_name, model_version, alias, tracking_uri."""
        return {
            "run_id": self.run_id,
            "model_name": self.name,
            "model_version": self.number,
            "alias": self.alias,
            "tracking_uri": redacted(self.uri),
        }


def is_model_uri(source: str) -> bool:
    """Whether this asks the registry for a model, rightly or not."""
    return source.startswith("models:")


def promote(name: str, version: str, *, alias: str, uri: str | None = None) -> dict[str, Any]:
    """Move an alias to a version, and write down who did so, when, and where it was before.

    The record is a tag of the registered model, clotline.alias.<alias>.<time>, one for every move, and the tag
    clotline.<alias>_since of the version.

    Args:
        version: a number, or another alias such as challenger.
        uri: of the store; as `options.resolve_uri`.

    Returns:
        name, alias, version and from_version (None before the first), as JSON types.

    Raises:
        TrackingOptionsError: a name or an alias that the registry cannot have.
        TrackingError: there is no such model, version or alias, or the store cannot be reached.
    """
    check_model_name(name)
    check_alias(alias)
    client, uri = client_of(uri)
    try:
        aliases = client.get_registered_model(name).aliases
        number = _number(name, version.removeprefix("@"), aliases)
        client.get_model_version(name, number)
        before = aliases.get(alias)
        now = datetime.datetime.now(datetime.timezone.utc)
        record = {
            "version": number,
            "from_version": before and str(before),
            "by": _user(),
            "at": now.isoformat(),
        }
        if str(before) != number:
            tag = f"clotline.alias.{alias}.{now:%Y%m%dT%H%M%S.%fZ}"
            client.set_registered_model_tag(name, tag, json.dumps(record))
            client.set_model_version_tag(name, number, f"clotline.{alias}_since", json.dumps(record))
            client.set_registered_model_alias(name, alias, number)
    except Exception as error:
        raise registry_error(error, uri, f"{name} version {version}") from error
    return {"name": name, "alias": alias, **record}


def find_version(model_uri: str, *, uri: str | None = None) -> RegisteredVersion:
    """The version that a URI of the registry stands for now.

    Args:
        model_uri: models:/NAME@ALIAS or models:/NAME/VERSION.
        uri: of the store; as `options.resolve_uri`.

    Raises:
        TrackingOptionsError: the URI is not of that form.
        TrackingError: there is no such model, version or alias, or the store cannot be reached.
    """
    asked = _MODEL_URI.fullmatch(model_uri)
    if asked is None:
        raise TrackingOptionsError(
            f"{model_uri!r} names no model; use models:/NAME@ALIAS or models:/NAME/VERSION, such as models:/clotline@champion"
        )
    client, uri = client_of(uri)
    name = asked["name"]
    try:
        aliases = client.get_registered_model(name).aliases
        number = _number(name, asked["alias"] or asked["version"], aliases)
        version = client.get_model_version(name, number)
    except Exception as error:
        raise registry_error(error, uri, model_uri) from error
    return RegisteredVersion(name, number, asked["alias"], version.run_id or None, dict(version.tags), uri)


def fetch_folder(version: RegisteredVersion, folder: str, marker: str, directory: Path | str) -> Path:
    """Copy a folder of a version's artefacts to `directory`, which must not exist, and return it.

    Args:
        folder: path inside the version.
        marker: a file that the folder has to hold.

    Raises:
        OutputExistsError: `directory` is there already.
        TrackingError: the version holds no such folder, or the store cannot be reached.
    """
    directory = Path(directory)
    if directory.exists():
        raise OutputExistsError(f"{directory} exists already; name another folder for {version.told}")
    client, uri = client_of(version.uri)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.partial-", dir=directory.parent) as temporary:
        try:
            client.get_model_version(version.name, version.number)  # it may have been deleted meanwhile
            import mlflow.artifacts

            source = f"models:/{version.name}/{version.number}/{folder}"
            with store.uploading():
                found = mlflow.artifacts.download_artifacts(source, dst_path=temporary, tracking_uri=uri)
        except Exception as error:
            if "No such artifact" not in str(error):
                raise registry_error(error, uri, version.told) from error
            found = temporary
        if not Path(found, marker).is_file():
            raise TrackingError(f"{version.told} holds no {marker} in {folder}")
        shutil.move(found, directory)
    return directory


def fetch_checkpoint(
    model_uri: str | RegisteredVersion, directory: Path | str, *, uri: str | None = None
) -> Path:
    """Copy the Checkpoint of a registered model to `directory`, which must not exist, and return it.

    Args:
        model_uri: models:/NAME@ALIAS or models:/NAME/VERSION, or what `find_version` found.
        uri: of the store; as `options.resolve_uri`.

    Raises:
        TrackingOptionsError: the URI is not of that form.
        OutputExistsError: `directory` is there already.
        TrackingError: there is no such model, version or alias, it holds no Checkpoint, or the store cannot be reached.
    """
    version = find_version(model_uri, uri=uri) if isinstance(model_uri, str) else model_uri
    release = version.tags.get("clotline.release_id")
    if release is not None:
        raise TrackingError(
            f"{version.told} is the release {release} and holds no checkpoint; name the version that it was exported from"
            + (f", {made_of}" if (made_of := version.tags.get("clotline.exported_from")) else "")
        )
    return fetch_folder(version, CHECKPOINT_IN_MODEL, "checkpoint.json", directory)


def client_of(uri: str | None) -> tuple[Any, str]:
    """A client of the store, and its URI as `options.resolve_uri` has it; raises TrackingError."""
    resolved = resolve_uri(uri)
    prepare_store(resolved)
    return store.connect(resolved), resolved


def _number(name: str, told: str, aliases: dict[str, Any]) -> str:
    if told.isdecimal():
        return str(int(told))
    if told not in aliases:
        known = ", ".join(f"{alias} (version {version})" for alias, version in sorted(aliases.items()))
        raise TrackingError(f"the model {name!r} has no alias {told!r}; it has {known or 'none'}")
    return str(aliases[told])


def registry_error(error: Exception, uri: str, asked: str) -> TrackingError:
    """What MLflow raised while it was asked for something, as an error of ours."""
    ours = store.as_our_error(error, uri)
    if isinstance(ours, store.RefusedError):
        return TrackingError(f"{asked} is not in the registry of {redacted(uri)}: {ours}")
    return ours


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
