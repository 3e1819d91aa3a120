"""MLflow's model registry: aliases that move only by command, and the way from a model's name to its Checkpoint."""

from __future__ import annotations

import datetime
import getpass
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from training.errors import OutputExistsError, TrackingError, TrackingOptionsError
from training.tracking import store
from training.tracking.model import CHECKPOINT_IN_MODEL
from training.tracking.options import check_alias, check_model_name, prepare_store, resolve_uri

_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


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
    client, uri = _client(uri)
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
        raise _registry_error(error, uri, f"{name} version {version}") from error
    return {"name": name, "alias": alias, **record}


def fetch_checkpoint(model_uri: str, directory: Path | str, *, uri: str | None = None) -> Path:
    """Copy the Checkpoint of a registered model to `directory`, which must not exist, and return it.

    Args:
        model_uri: models:/NAME@ALIAS or models:/NAME/VERSION.
        uri: of the store; as `options.resolve_uri`.

    Raises:
        TrackingOptionsError: the URI is not of that form.
        OutputExistsError: `directory` is there already.
        TrackingError: there is no such model, version or alias, it holds no Checkpoint, or the store cannot be reached.
    """
    asked = _MODEL_URI.fullmatch(model_uri)
    if asked is None:
        raise TrackingOptionsError(
            f"{model_uri!r} names no model; use models:/NAME@ALIAS or models:/NAME/VERSION, such as models:/clotline@champion"
        )
    directory = Path(directory)
    if directory.exists():
        raise OutputExistsError(
            f"{directory} exists already; name another folder for the checkpoint of {model_uri}"
        )
    client, uri = _client(uri)
    name = asked["name"]
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.partial-", dir=directory.parent) as temporary:
        try:
            aliases = client.get_registered_model(name).aliases
            number = _number(name, asked["alias"] or asked["version"], aliases)
            import mlflow.artifacts

            source = f"models:/{name}/{number}/{CHECKPOINT_IN_MODEL}"
            with store.uploading():
                found = mlflow.artifacts.download_artifacts(source, dst_path=temporary, tracking_uri=uri)
        except Exception as error:
            raise _registry_error(error, uri, model_uri) from error
        if not Path(found, "checkpoint.json").is_file():
            raise TrackingError(
                f"{model_uri} (version {number}) holds no checkpoint of Clotline in {CHECKPOINT_IN_MODEL}"
            )
        shutil.move(found, directory)
    return directory


def _client(uri: str | None) -> tuple[Any, str]:
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


def _registry_error(error: Exception, uri: str, asked: str) -> TrackingError:
    ours = store.as_our_error(error, uri)
    if isinstance(ours, store.RefusedError):
        return TrackingError(f"{asked} is not in the registry of {uri}: {ours}")
    return ours


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
