"""python -m demo --out runs/demo [--data DIR] [--recipe demo] [--formats onnx,torchscript]

Walks the whole path with the command lines that a user would type: slides, training, export, serving,
    prediction. At
the end OUT holds training/, release/, heatmaps/, logs/, report.html and summary.json. Without
--data, slides are generated in OUT/data; they are synthetic, and kept for the next run.

Exit code 0 only if everything worked: every image answered, served probabilities equal to PyTorch's within
    1e-4, and
(on generated slides) a ROC AUC of at least 0.9 over held-out patients. The last line of standard output is
summary.json in one line.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from demo.errors import UsageProblem
from demo.path import STAGE_ERRORS, Options, walk
from demo.stages import say, typed

GENERATED_LEAST_AUC = 0.9


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        options = _options(arguments)
        signal.signal(signal.SIGTERM, _interrupt)
        outcome = walk(options)
    except UsageProblem as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except STAGE_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what an earlier run left is untouched", file=sys.stderr)
        return 130
    say(f"\nreport:  {options.out / 'report.html'}\nsummary: {options.out / 'summary.json'}")
    say(f"serve it again: {typed(['serving', 'up', '--repository', options.out / 'release' / 'models'])}")
    for problem in outcome.problems:
        print(f"error: {problem}", file=sys.stderr)
    print(
        json.dumps(outcome.summary(), separators=(",", ":"), ensure_ascii=False, allow_nan=False), flush=True
    )
    return 1 if outcome.problems else 0


def _options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="where to write (default: %(default)s)"
    )
    parser.add_argument(
        "--data", type=Path, help="your own train.csv and train/ (default: slides are generated)"
    )
    parser.add_argument(
        "--recipe", default="demo", help="training recipe, name or path (default: %(default)s)"
    )
    parser.add_argument(
        "--formats", default="onnx,torchscript", help="formats to export (default: %(default)s)"
    )
    parser.add_argument(
        "--least-patient-auc",
        type=float,
        help="bar for the ROC AUC over held-out patients (default: "
        f"{GENERATED_LEAST_AUC} on generated slides, else none)",
    )
    chosen = parser.parse_args(arguments)
    formats = tuple(name.strip() for name in chosen.formats.split(","))
    if not all(formats) or len(set(formats)) < len(formats):
        raise UsageProblem(f"--formats {chosen.formats!r}: name each format once, as in onnx,torchscript")
    if chosen.data is not None and not (chosen.data / "train.csv").is_file():
        raise UsageProblem(
            f"--data {chosen.data}: there is no train.csv in it; it must hold train.csv and "
            "train/<image_id>.tif"
        )
    least = chosen.least_patient_auc
    if least is None and chosen.data is None:
        least = GENERATED_LEAST_AUC
    if least is not None and not 0 <= least <= 1:
        raise UsageProblem(f"--least-patient-auc {least}: must be from 0 to 1")
    data = chosen.data.resolve() if chosen.data is not None else None
    return Options(chosen.out.resolve(), data, chosen.recipe, formats, least)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """SIGTERM ends the run as Ctrl-C does, so that no server or training is left behind."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
