"""Whether the artefacts of a release still answer its golden tiles as PyTorch did when it was written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporters.comparison_tiles import EncodedTile, decode_tiles
from exporters.errors import ExportError, ReleaseError
from exporters.formats import FORMATS, formats_named
from exporters.formats.interface import Runner
from exporters.golden import read_golden
from exporters.parity import one_torch_thread
from exporters.release_manifest import GOLDEN, MODELS, FormatEntry, Manifest
from slides.spec import ModelSpec

_BATCH = 8


def answer_again(
    release: Path, manifest: Manifest, announce: Callable[[str], object]
) -> tuple[dict[str, Any], list[str]]:
    """Ask every published artefact that runs on this machine.

    Returns:
        format -> {"tiles", "max_abs_diff", "label_flips"} or {"not_asked": why}, and what is wrong, a line each.

    Raises:
        ReleaseError: golden.json cannot be used.
    """
    if manifest.kind != "tile":
        from exporters.slide.verification import answers_again

        problems = answers_again(release, manifest, announce)
        return {"bags": len(read_golden(release / GOLDEN)["items"])}, problems
    tiles_NHWC, wanted_NK = _golden_tiles(release, manifest)
    answered: dict[str, Any] = {}
    problems = []
    for name, entry in manifest.formats.items():
        if not entry.classifiers:
            continue
        announce(name)
        try:
            answered[name] = _asked(release, name, entry, tiles_NHWC, wanted_NK)
        except (ExportError, ImportError) as error:
            problems.append(f"{name}: {error}")
            continue
        problems += _too_far(name, answered[name], manifest.tolerances[entry.precision])
    return answered, problems


def _asked(
    release: Path, name: str, entry: FormatEntry, tiles_NHWC: np.ndarray, wanted_NK: np.ndarray
) -> dict[str, Any]:
    if name not in FORMATS:
        return {"not_asked": "this Clotline does not know the format"}
    (fmt,) = formats_named([name])
    if not fmt.runs_here():
        return {"not_asked": fmt.unproven_here() or "it does not run on this machine"}
    run = fmt.open(release / MODELS / entry.model / "1" / fmt.artifact_filename)
    answered_NK = _answers(run, tiles_NHWC)
    if answered_NK.shape != wanted_NK.shape or not np.isfinite(answered_NK).all():
        raise ReleaseError(f"it answers {list(answered_NK.shape)} values, or some that are not finite")
    return {
        "tiles": len(wanted_NK),
        "max_abs_diff": float(np.abs(answered_NK - wanted_NK).max()),
        "label_flips": int((answered_NK.argmax(axis=1) != wanted_NK.argmax(axis=1)).sum()),
    }


def _answers(run: Runner, tiles_NHWC: np.ndarray) -> np.ndarray:
    try:
        with one_torch_thread():
            parts = [run(tiles_NHWC[at : at + _BATCH])[0] for at in range(0, len(tiles_NHWC), _BATCH)]
    except Exception as error:  # each runtime has errors of its own
        raise ReleaseError(f"it fails on golden tiles: {type(error).__name__}: {error}") from error
    return np.concatenate(parts)


def _too_far(name: str, answered: Mapping[str, Any], tolerance: Mapping[str, Any]) -> list[str]:
    if "not_asked" in answered:
        return []
    problems = []
    if answered["max_abs_diff"] > tolerance["max_abs_diff"]:
        problems.append(
            f"{name}: answers differ from golden.json by up to {answered['max_abs_diff']:.3g} (allowed "
            f"{tolerance['max_abs_diff']:g})"
        )
    if answered["label_flips"] > tolerance["flip_share"] * answered["tiles"]:
        problems.append(
            f"{name}: {answered['label_flips']} labels of {answered['tiles']} differ from golden.json"
        )
    return problems


def _golden_tiles(release: Path, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    items: Sequence[Mapping[str, Any]] = read_golden(release / GOLDEN)["items"]
    spec = ModelSpec.from_dict(manifest.spec)
    try:
        encoded = [
            EncodedTile(item["path"], (release / GOLDEN / item["path"]).read_bytes()) for item in items
        ]
        wanted_NK = np.array([item["probabilities"] for item in items], np.float32)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ReleaseError(
            f"{release / GOLDEN}/golden.json does not belong to the tiles beside it: {error}"
        ) from error
    return decode_tiles(encoded, spec.input_size_px), wanted_NK
