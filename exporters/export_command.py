"""python -m exporters export CHECKPOINT --release DIR --formats onnx,torchscript

Builds a network in every format named, compares each with PyTorch on real tiles, in this process and through a
tritonserver, and writes a release: models for Triton, golden tiles, release.json, a model card. The first format answers
as `tile_classifier` (of a slide checkpoint or an ensemble: `slide_classifier`), each further one as
`tile_classifier_<format>`. CHECKPOINT is the directory that training wrote, the definition of an ensemble, or
models:/NAME@ALIAS of MLflow's registry.

A further format that is refused is listed with its figures; a refused first one, or with --strict any, fails the export.
With --repository in place of --release the models go into a model repository, at the next version number, all of them or
none. Exit code: 0 published; 1 not published, because an artefact, a server or the disk failed; 2 not published, because
the request cannot be fulfilled; 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.formats import FORMATS
from exporters.interruption import interruptible

if TYPE_CHECKING:
    from exporters.draft import ExportedFormat
    from exporters.release import Release

_SHOUTED = "NOT PROVEN THROUGH A SERVER: --without-server was given; no answer of a tritonserver was compared"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All that an export can be told."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="directory, ensemble definition, or models:/NAME@ALIAS"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--release", type=Path, metavar="DIR", help="release to write; must not exist")
    where.add_argument("--repository", type=Path, metavar="DIR", help="Triton model repository to add to")
    parser.add_argument(
        "--formats",
        default="onnx",
        metavar="LIST",
        help=f"comma-separated, of: {', '.join(FORMATS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--max-batch",
        type=int,
        default=8,
        metavar="N",
        help="most tiles in one execution (default: %(default)s)",
    )
    parser.add_argument(
        "--instances",
        type=int,
        default=2,
        metavar="N",
        help="executions of the first format at the same time; further formats have one (default: %(default)s)",
    )
    parser.add_argument(
        "--instance-kind",
        default="cpu",
        metavar="KIND",
        help="where networks run: cpu, gpu or auto, the server decides (default: %(default)s)",
    )
    parser.add_argument(
        "--versions-loaded",
        type=int,
        default=1,
        metavar="N",
        help="newest versions of a network that the server loads; 2 for a release without downtime, at twice the "
        "memory (default: %(default)s)",
    )
    parser.add_argument(
        "--tiles",
        type=Path,
        metavar="SOURCE",
        help="tiles to compare on, not the checkpoint's golden tiles: a directory, a data set of tiles or a tile store "
        "(of the last two, held-out patients)",
    )
    parser.add_argument(
        "--calibration-tiles",
        type=Path,
        metavar="SOURCE",
        help="tiles to calibrate INT8 with: a directory, a data set of tiles or a tile store (of the last two, training "
        "patients)",
    )
    parser.add_argument(
        "--publish-unproven",
        action="store_true",
        help="also publish further formats that this machine cannot prove; the server loads them like the others",
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail if any format is refused, not only the first one"
    )
    parser.add_argument(
        "--without-server",
        action="store_true",
        help="do not prove the answers of a tritonserver; the release says so",
    )
    parser.add_argument(
        "--container",
        metavar="TAG",
        help="Triton container that will serve, such as 26.07: ONNX files are written for its runtime",
    )
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow store that models:/ is looked up in, as for training"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Export; raises as `exporters.release.export_release`."""
    started_s = time.monotonic()
    with interruptible() as interrupted:
        # Imported here: torch takes seconds, and --help and bad usage need none of it.
        from exporters.registry.origin import checkpoint_at
        from exporters.release import export_checkpoint, export_release

        common: dict[str, Any] = {
            "tiles_source": options.tiles,
            "calibration_source": options.calibration_tiles,
            "publish_unproven": options.publish_unproven,
            "served": not options.without_server,
            "container": options.container,
            "interrupted": interrupted,
        }
        names = [name.strip() for name in options.formats.split(",") if name.strip()]
        serving = _serving_options(options)
        with checkpoint_at(options.checkpoint, tracking_uri=options.tracking_uri) as found:
            if options.release is not None:
                release = export_release(
                    found.directory,
                    options.release,
                    names,
                    serving,
                    strict=options.strict,
                    mlflow=found.mlflow,
                    **common,
                )
            else:
                release = export_checkpoint(found.directory, options.repository, names, serving, **common)
    for name, exported in release.formats.items():
        print(f"{name}: {_in_words(exported, release.version)}", file=sys.stderr)
    if options.without_server:
        print(_SHOUTED, file=sys.stderr)
    return _summary(release, time.monotonic() - started_s)


def _serving_options(options: argparse.Namespace) -> Any:
    from exporters.serving_options import ServingOptions

    return ServingOptions(
        options.max_batch, options.instances, options.instance_kind, options.versions_loaded
    )


def _in_words(exported: ExportedFormat, version: int) -> str:
    measured, acceptance = exported.parity, exported.acceptance
    where = f"{', '.join(exported.classifiers)} -> {exported.model} version {version}"
    if not exported.classifiers:
        where = "refused" if acceptance.status == "refused" else "not published (--publish-unproven does)"
    words = [where, f"{exported.artifact_bytes / 1e6:.1f} MB"]
    if measured is not None:
        words.append(
            f"differs from PyTorch by at most {measured.max_abs_diff:.2g} on {measured.tiles} tiles at batch "
            f"{', '.join(map(str, measured.batches))}"
        )
        if measured.precision != "fp32":
            words.append(f"{measured.label_flips} other labels")
    if exported.served is not None:
        words.append("and through a tritonserver")
    speed = acceptance.speed
    if speed is not None:
        ratio = "" if speed.ratio is None else f", {speed.ratio:.2f} x FP32"
        words.append(f"{speed.images_per_s:.0f} images/s{ratio} at batch {speed.batch}")
    if acceptance.reasons:
        words.append(f"{acceptance.status}: {'; '.join(acceptance.reasons)}")
    return ", ".join(words)


def _summary(release: Release, wall_s: float) -> dict[str, Any]:
    from exporters.release_record import as_json, speed_entry

    where = {"repository": str(release.repository)}
    if release.directory is not None and release.manifest is not None:
        where |= {"release": str(release.directory), "release_id": release.manifest.release_id}
    return {
        **where,
        "version": release.version,
        "models": list(release.models),
        "formats": {
            name: {
                "model": exported.model,
                "classifiers": list(exported.classifiers),
                "bytes": exported.artifact_bytes,
                "sha256": exported.artifact_sha256,
                "status": exported.acceptance.status,
                "reasons": list(exported.acceptance.reasons),
                "speed": speed_entry(exported),
                "notes": as_json(exported.notes),
                **(dataclasses.asdict(exported.parity) if exported.parity is not None else {}),
                "served": as_json(exported.served),
            }
            for name, exported in release.formats.items()
        },
        "wall_s": round(wall_s, 2),
    }
