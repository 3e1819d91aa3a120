"""What a release says of the checkpoint that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KEPT = (
    "architecture",
    "weights_sha256",
    "encoder_sha256",
    "head_sha256",
    "embedding_dim",
    "bags",
    "git_commit",
    "created_utc",
    "versions",
    "metrics",
    "recipe",
)


def checkpoint_entry(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The entry "checkpoint" of release.json.

    Lists of patients and slides are left out: a release goes to places that have no business with them. How many there
    are is kept, as `<name>_count`.

    Args:
        manifest: checkpoint.json.
    """
    data = {}
    for key, value in manifest["data"].items():
        if isinstance(value, (list, tuple, dict)):
            data[f"{key}_count"] = len(value)
        else:
            data[key] = value
    kept = {key: manifest[key] for key in _KEPT if key in manifest}
    return {"kind": manifest.get("kind", "tile"), **kept, "data": data}


def pretrained_entry(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """Weights, source and licence of what training started from; None if it started from nothing."""
    told = manifest.get("pretrained")
    if not isinstance(told, Mapping):
        return None
    return {key: told.get(key) for key in ("weights", "source", "licence", "sha256")}
