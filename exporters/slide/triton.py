"""Files of the Triton models that a slide release adds to its encoders: the head, and `slide_classifier`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporters.errors import RepositoryError
from exporters.reference_profile import parameter_of
from exporters.slide.combination import MEMBERS
from exporters.slide.head import HEAD_OUTPUTS, embedding_names
from exporters.slide.source import SlideSource
from exporters.triton_config import (
    CONFIG_FILENAME,
    HEAD_MODEL,
    LABELS_FILENAME,
    SLIDE_MODEL,
    SlideOutput,
    head_config,
    labels_text,
    slide_classifier_config,
    to_text,
)
from training.reference_profile import ReferenceProfile

RELEASE_OUTPUT = "release"
SLIDES_AT_ONCE = 4
"""Slides that `slide_classifier` works on at the same time, a process each; further ones wait in Triton's queue."""
HEADS_AT_ONCE = 1
TILES_A_REQUEST = 2
REQUESTS_IN_FLIGHT = 8
"""Of one slide, to its embedder."""
LEAST_MAX_TILES = 1024
MAX_BAG_BYTES = 256 * 2**20
_HAND_WRITTEN = Path(__file__).resolve().parents[2] / "model_repository" / SLIDE_MODEL / "1" / "model.py"


def head_files(source: SlideSource, content: bytes, version: int) -> dict[str, bytes]:
    """The head: path below models/ -> content."""
    names = embedding_names(len(source.members))
    dims = [member.head.embedding_dim for member in source.members]
    config = head_config(
        inputs=dict(zip(names, dims, strict=True)), outputs=_outputs(source), instances=HEADS_AT_ONCE
    )
    return {
        f"{HEAD_MODEL}/{version}/model.onnx": content,
        f"{HEAD_MODEL}/{LABELS_FILENAME}": _labels(source),
        f"{HEAD_MODEL}/{CONFIG_FILENAME}": to_text(config).encode(),
    }


def slide_classifier_files(
    source: SlideSource,
    name: str,
    format_name: str,
    *,
    embedder: str,
    embedder_outputs: Sequence[str],
    version: int,
    max_batch: int,
    unproven: Sequence[str] = (),
    profile: ReferenceProfile | None = None,
) -> dict[str, bytes]:
    """A public slide model: path below models/ -> content.

    Args:
        format_name: of the encoders behind it.
        embedder: the ensemble that makes embeddings of tiles.
        embedder_outputs: its outputs, one a member.
        version: of this model and its parts.
        max_batch: most tiles that the embedder takes in one request.
        unproven: why this machine could not prove it.
        profile: what its drift is measured against; what tiles look like is told by a tile classifier where there is one.

    Raises:
        RepositoryError: the hand-written model is not in this checkout.
    """
    parameters = {
        "clotline_spec": source.spec.to_json(),
        "clotline_checkpoint": _compact(_origin(source, format_name)),
        "embedder_model": embedder,
        "embedder_version": str(version),
        "embedder_outputs": ",".join(embedder_outputs),
        "head_model": HEAD_MODEL,
        "head_version": str(version),
        "max_tiles": str(max(LEAST_MAX_TILES, 2 * source.spec.tiles_per_slide)),
        "max_bag_bytes": str(MAX_BAG_BYTES),
        "tiles_a_request": str(min(TILES_A_REQUEST, max_batch)),
        "requests_in_flight": str(REQUESTS_IN_FLIGHT),
        **parameter_of(profile, "slides", with_appearance=name == SLIDE_MODEL and source.kind != "tile"),
    }
    if source.bag.tiles:
        parameters["clotline_bag"] = _compact({"tiles": source.bag.tiles, "choice": source.bag.choice})
    if unproven:
        parameters["clotline_unproven"] = "; ".join(unproven)
    outputs = [*_outputs(source), SlideOutput(RELEASE_OUTPUT, "STRING", (1,))]
    config = slide_classifier_config(name, outputs=outputs, instances=SLIDES_AT_ONCE, parameters=parameters)
    try:
        code = _HAND_WRITTEN.read_bytes()
    except OSError as error:
        raise RepositoryError(
            f"The slide model cannot be read at {_HAND_WRITTEN}: {error.strerror}. Run the exporter from a checkout of "
            "Clotline."
        ) from error
    return {
        f"{name}/{version}/model.py": code,
        f"{name}/{LABELS_FILENAME}": _labels(source),
        f"{name}/{CONFIG_FILENAME}": to_text(config).encode(),
    }


def member_label(source: SlideSource, member: int) -> str:
    """What a member is called where it is told of."""
    return f"{member} {source.definition.members[member].name}"


def _outputs(source: SlideSource) -> list[SlideOutput]:
    classes, members = len(source.spec.class_names), len(source.members)
    dims = {"probabilities": (classes,), "attention": (-1,), MEMBERS: (members, classes)}
    types = {"label_index": "INT64", "answered": "BOOL"}
    return [SlideOutput(name, types.get(name, "FP32"), dims.get(name, (1,))) for name in HEAD_OUTPUTS]


def _origin(source: SlideSource, format_name: str) -> dict[str, Any]:
    """Where the networks come from: short, because every client reads it."""
    kept = ("kind", "architecture", "weights_sha256", "encoder_sha256", "head_sha256", "git_commit", "method")
    told = {key: source.origin[key] for key in kept if source.origin.get(key) is not None}
    members = source.origin.get("members")
    if members:
        told["members"] = [
            {key: entry[key] for key in ("name", *kept) if entry.get(key)} for entry in members
        ]
    return {**told, "format": format_name}


def _labels(source: SlideSource) -> bytes:
    return labels_text(source.spec.class_names).encode()


def _compact(document: Mapping[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
