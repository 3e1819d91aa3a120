"""From what was staged and proven to the manifest, the card and the pictures of a release."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping
from typing import Any

from exporters import build_environment
from exporters.exported_format import REFUSED, ExportedFormat
from exporters.release_manifest import PLOTS, REFERENCE_PLOT, FileEntry, FormatEntry, Manifest, release_id
from exporters.staging import Staging
from exporters.tolerances import TOLERANCES


def format_entries(staging: Staging, not_served_because: str | None) -> dict[str, dict[str, Any]]:
    """The manifest's "formats"."""
    return {
        name: format_entry(exported, not_served_because).model_dump(mode="json")
        for name, exported in staging.formats.items()
    }


def format_entry(exported: ExportedFormat, not_served_because: str | None) -> FormatEntry:
    """One entry of "formats".

    Args:
        not_served_because: why no server was asked at all; None where it was.
    """
    acceptance = exported.acceptance
    unserved = None
    if exported.served is None:
        unserved = not_served_because or (
            "it was refused" if acceptance.status == REFUSED else "it is unproven and was not published"
        )
    return FormatEntry.model_validate(
        as_json(
            {
                "model": exported.model,
                "classifiers": exported.classifiers,
                "precision": exported.precision,
                "status": acceptance.status,
                "reasons": acceptance.reasons,
                "bytes": exported.artifact_bytes,
                "files": exported.files,
                "parity": {
                    "in_process": exported.parity,
                    "served": exported.served,
                    "not_served_because": unserved,
                },
                "speed": speed_entry(exported),
                "notes": exported.notes,
            }
        )
    )


def speed_entry(exported: ExportedFormat) -> dict[str, Any] | None:
    """Rates and their ratio as JSON types, or None where none was measured."""
    speed = exported.acceptance.speed
    if speed is None:
        return None
    ratio = speed.ratio
    return {**dataclasses.asdict(speed), "ratio": None if ratio is None else round(ratio, 3)}


def plots(staging: Staging, formats: Mapping[str, Any]) -> dict[str, bytes]:
    """Path below the release -> PNG."""
    from exporters.layer_errors import layer_errors, layers_plot
    from exporters.plots import speed_accuracy
    from exporters.reference_plot import reference_plot

    drawn = {f"{PLOTS}/speed_accuracy.png": speed_accuracy(formats, title=_title(staging))}
    if staging.reference is not None:
        drawn[REFERENCE_PLOT] = reference_plot(staging.reference, title="What drift is measured against")
    for name, (fp32, int8, tiles_NHWC) in staging.layer_sources.items():
        errors = layer_errors(fp32, int8, tiles_NHWC)
        title = f"{name} against FP32, layer by layer"
        drawn[f"{PLOTS}/{name}_layers.png"] = layers_plot(errors, title=title)
    return drawn


def manifest_of(
    staging: Staging,
    formats: Mapping[str, Any],
    files: Mapping[str, FileEntry],
    mlflow: Mapping[str, Any] | None,
) -> Manifest:
    """The manifest.

    Args:
        formats: of `format_entries`.
        files: path below the release -> its digest, of all files.
        mlflow: where the checkpoint came from, or None.
    """
    commit, dirty = build_environment.commit()
    targets = (entry["notes"].get("onnx") for entry in formats.values() if entry["status"] != REFUSED)
    return Manifest.model_validate(
        as_json(
            {
                "kind": staging.kind,
                "release_id": release_id({path: entry.sha256 for path, entry in files.items()}),
                "classifiers": staging.classifiers(),
                "formats": formats,
                "spec": staging.spec.as_dict(),
                "checkpoint": staging.checkpoint(),
                "mlflow": mlflow,
                "pretrained": staging.pretrained(),
                "git_commit": commit,
                "git_dirty": dirty,
                "versions": build_environment.versions(),
                "onnx": next(filter(None, targets), None),
                "tolerances": {
                    entry["precision"]: TOLERANCES[entry["precision"]] for entry in formats.values()
                },
                "reference": None if staging.reference is None else staging.reference.as_dict(),
                "machine": build_environment.machine(),
                "created_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "files": {path: entry.model_dump() for path, entry in files.items()},
            }
        )
    )


def as_json(value: Any) -> Any:
    """JSON types of dataclasses, mappings and sequences; numbers that are not finite are None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(entry) for entry in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    if hasattr(value, "item"):
        return as_json(value.item())
    json.dumps(value)
    return value


def _title(staging: Staging) -> str:
    return f"{staging.kind} classifier ({', '.join(staging.spec.class_names)}): speed against accuracy"
