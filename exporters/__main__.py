"""python -m exporters export CHECKPOINT --repository DIR --formats onnx,torchscript

Writes a checkpoint into a Triton model repository: a network a format, the preprocess model, and the ensembles
`tile_classifier` (of the first format) and `tile_classifier_<format>` (of each further one). Every network is compared
with PyTorch on real tiles first; on any failure nothing is published. Exit code: 0 published; 1 not published, because
an artefact or the disk failed; 2 not published, because the request cannot be fulfilled; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.errors import ExportError, FormatError, GoldenTilesError
from exporters.formats import FORMATS
from training.errors import TrainingError

if TYPE_CHECKING:
    from exporters.draft import ExportedFormat
    from exporters.release import Release


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    started_s = time.monotonic()
    interrupted = threading.Event()
    try:
        with _interruptible(interrupted):
            release = _export(parsed, interrupted)
    except KeyboardInterrupt:
        print("interrupted; nothing was published", file=sys.stderr)
        return 130
    except (FormatError, GoldenTilesError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, exported in release.formats.items():
        print(f"{name}: {_in_words(exported, release.version)}", file=sys.stderr)
    print(
        json.dumps(_summary(release, time.monotonic() - started_s), separators=(",", ":"), ensure_ascii=False)
    )
    return 0


def _in_words(exported: ExportedFormat, version: int) -> str:
    measured, acceptance = exported.parity, exported.acceptance
    where = f"{', '.join(exported.classifiers)} -> {exported.model} version {version}"
    words = [
        where if exported.classifiers else "not published (--publish-unproven does)",
        f"{exported.artifact_bytes / 1e6:.1f} MB",
    ]
    if measured is not None:
        words.append(
            f"differs from PyTorch by at most {measured.max_abs_diff:.2g} on {measured.tiles} tiles at batch "
            f"{', '.join(map(str, measured.batches))}"
        )
        if measured.precision != "fp32":
            words.append(f"{measured.label_flips} other labels")
    if acceptance.speed is not None:
        words.append(
            f"{acceptance.speed.images_per_s:.0f} images/s, {acceptance.speed.ratio:.2f} x FP32 at batch "
            f"{acceptance.speed.batch}"
        )
    if acceptance.reasons:
        words.append(f"unproven: {'; '.join(acceptance.reasons)}")
    return ", ".join(words)


def _is_importing(frame: types.FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def _interruptible(interrupted: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt, and set the event.

    The event is for an interrupt that arrives inside a destructor or callback of a library: Python prints that one
    and drops it, and the export would go on. One that arrives while a module is being imported is sent again a moment
    later: extension modules in C++ end the whole process when an exception comes out of their import.
    """

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        interrupted.set()
        if _is_importing(frame):
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            return
        raise KeyboardInterrupt

    def unraisable(dropped: sys.UnraisableHookArgs) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(dropped)

    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        yield
    except ExportError:
        if interrupted.is_set():  # a library turned the interrupt into an error of its own
            raise KeyboardInterrupt from None
        raise
    finally:
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _export(parsed: argparse.Namespace, interrupted: threading.Event) -> Release:
    # Imported here: torch takes seconds, and --help and bad usage need none of it.
    from exporters.release import ServingOptions, export_checkpoint

    return export_checkpoint(
        parsed.checkpoint,
        parsed.repository,
        [name.strip() for name in parsed.formats.split(",") if name.strip()],
        ServingOptions(parsed.max_batch, parsed.instances, parsed.instance_kind, parsed.versions_loaded),
        tiles_source=parsed.tiles,
        calibration_source=parsed.calibration_tiles,
        publish_unproven=parsed.publish_unproven,
        interrupted=interrupted,
    )


def _summary(release: Release, wall_s: float) -> dict[str, Any]:
    return {
        "repository": str(release.repository),
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
                "speed": _speed(exported),
                "notes": dict(exported.notes),
                **(dataclasses.asdict(exported.parity) if exported.parity is not None else {}),
            }
            for name, exported in release.formats.items()
        },
        "wall_s": round(wall_s, 2),
    }


def _speed(exported: ExportedFormat) -> dict[str, Any] | None:
    speed = exported.acceptance.speed
    return None if speed is None else {**dataclasses.asdict(speed), "ratio": round(speed.ratio, 3)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m exporters", description=__doc__.partition("\n\n")[2])
    export = parser.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser(
        "export",
        help="write a checkpoint into a Triton model repository",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="directory that training wrote")
    export.add_argument(
        "--repository", type=Path, required=True, metavar="DIR", help="Triton model repository"
    )
    export.add_argument(
        "--formats", default="onnx", metavar="LIST", help=f"comma-separated, of: {', '.join(FORMATS)}"
    )
    export.add_argument("--max-batch", type=int, default=8, metavar="N", help="most tiles in one execution")
    export.add_argument(
        "--instances",
        type=int,
        default=2,
        metavar="N",
        help="executions of the first format at the same time; further formats have one",
    )
    export.add_argument(
        "--instance-kind",
        default="cpu",
        metavar="KIND",
        help="where networks run: cpu, gpu or auto (the server decides)",
    )
    export.add_argument(
        "--versions-loaded",
        type=int,
        default=1,
        metavar="N",
        help="newest versions of a network that the server loads; 2 for a release without downtime, at twice the memory",
    )
    export.add_argument(
        "--tiles",
        type=Path,
        metavar="SOURCE",
        help="tiles to compare on, not the checkpoint's golden tiles: a directory, a data set of tiles or a tile store "
        "(of the last two, held-out patients)",
    )
    export.add_argument(
        "--calibration-tiles",
        type=Path,
        metavar="SOURCE",
        help="tiles to calibrate INT8 with: a directory, a data set of tiles or a tile store (of the last two, training "
        "patients)",
    )
    export.add_argument(
        "--publish-unproven",
        action="store_true",
        help="also publish further formats that this machine cannot prove; the server loads them like the others",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
