"""Whether a slide release still answers as it did: its encoders and head, in this process, on its golden bags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.errors import GraphError
from exporters.formats import formats_named
from exporters.golden import read_golden
from exporters.slide.gate import EMBEDDING
from exporters.slide.head import ATTENTION, HeadRunner, open_head
from exporters.tolerances import TOLERANCES
from slides.decode import decode_tile
from slides.errors import TileDecodeError

if TYPE_CHECKING:
    from exporters.formats.interface import Runner, ServedFormat
    from exporters.release_manifest import Manifest

VERSION = "1"


def answers_again(
    release: Path, manifest: Manifest, announce: Callable[[str], object] = lambda text: None
) -> list[str]:
    """Ask what runs on this machine about the golden bags, and compare with golden.json.

    Args:
        release: of kind "slide" or "ensemble"; its files are those of the manifest.

    Returns:
        Problems, one line each; [] if every answer is within the tolerance of its precision.

    Raises:
        ReleaseError: golden.json cannot be read.
    """
    models, golden = release / "models", release / "golden"
    items = read_golden(golden)["items"]
    problems = []
    for name, entry in manifest.classifiers.items():
        (fmt,) = formats_named([entry.format])
        parts = entry.parts or {}
        if not fmt.runs_here():
            continue
        announce(f"{name}: asking about {len(items)} bags")
        try:
            head = open_head((models / parts["head"] / VERSION / "model.onnx").read_bytes())
            runners = [
                fmt.open(models / encoder / VERSION / fmt.artifact_filename, (EMBEDDING,))
                for encoder in parts["encoders"]
            ]
            problems += [
                f"{name}: {problem}"
                for item in items
                for problem in _of_bag(item, golden, fmt, runners, head, int(manifest.spec["input_size_px"]))
            ]
        except (GraphError, OSError, KeyError) as error:
            problems.append(f"{name}: {error}")
    return problems


def _of_bag(
    item: dict[str, Any],
    golden: Path,
    fmt: ServedFormat,
    runners: list[Runner],
    head: HeadRunner,
    size_px: int,
) -> list[str]:
    allowed = TOLERANCES[fmt.precision].max_abs_diff
    try:
        tiles_NHWC = np.stack([decode_tile((golden / path).read_bytes(), size_px) for path in item["paths"]])
    except TileDecodeError as error:
        return [f"bag {item['image_id']}: {error}"]
    embeddings = [np.concatenate([run(tile[None])[0] for tile in tiles_NHWC]) for run in runners]
    found = head(embeddings)
    problems = []
    for name in ("probabilities", ATTENTION):
        apart = float(np.abs(found[name] - np.asarray(item[name], np.float32)).max())
        if not apart <= allowed:
            problems.append(f"bag {item['image_id']}: {name} differ by {apart:.3g} (allowed {allowed:g})")
    return problems
