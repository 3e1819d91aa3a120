"""python -m clients predict SLIDE... --url localhost:8000 [--json] [--heatmap-dir DIR] [--labels train.csv]
python -m clients classify TILE... --url localhost:8000 [--json]
python -m clients predict SLIDE... --url https://gateway:8443 --ca ca.pem --api-key-file FILE

`predict` takes whole slides: finds tissue, sends tiles to the server, averages to slides and patients. With `--model
slide_classifier` the server answers for the slide itself, with attention a tile and uncertainty.
`classify` takes images that are tiles themselves (JPEG, PNG).

A gateway wants an API key: in a file, or in the environment variable CLOTLINE_API_KEY.

Prints tables (or, with --json, one JSON document a slide or tile) and, as the last line, one JSON document
with everything. What cannot be predicted is reported, the rest goes on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clients.access import api_key_from
from clients.errors import (
    AccessError,
    AddressError,
    AnswerError,
    ClientError,
    HeatmapError,
    RequestRefused,
)
from clients.heatmap import write_heatmap
from clients.prediction import Prediction, patient_predictions
from clients.slide_client import AUTO, SlideClient
from clients.table import patient_table, slide_table
from slides.errors import LabelsError, SlidesError
from slides.labels import SlideRecord, read_labels

# What is wrong with one slide or tile; every other error would meet the next one too and ends the run.
OF_ONE_FILE = (SlidesError, RequestRefused, AnswerError, HeatmapError, OSError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        problem = _usage_problem(options)
        if problem:
            print(f"error: {problem}", file=sys.stderr)
            return 2
        with SlideClient(
            options.url,
            model=options.model,
            timeout_s=options.timeout_s,
            concurrency=options.concurrency,
            batch=options.batch,
            api_key=api_key_from(options.api_key_file),
            ca=options.ca,
            certificate=options.certificate,
            certificate_key=options.certificate_key,
        ) as client:
            return options.run(client, options)
    except (AddressError, AccessError, LabelsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clients", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="predict | classify")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--url",
        default="localhost:8000",
        help="host:port, http://, https://, grpc:// or grpcs:// (default: %(default)s)",
    )
    shared.add_argument(
        "--model",
        default="tile_classifier",
        help="model on the server: tile_classifier, slide_classifier (attention a tile, uncertainty), or auto: "
        "slide_classifier where the server has it, else tile_classifier (default: %(default)s)",
    )
    shared.add_argument("--json", action="store_true", help="one JSON document a line in place of tables")
    shared.add_argument(
        "--timeout-s",
        type=_number_above_0,
        default=30.0,
        help="deadline of one request, retries included (default: 30)",
    )
    shared.add_argument(
        "--concurrency", type=_whole_number_above_0, default=2, help="requests under way at once (default: 2)"
    )
    shared.add_argument(
        "--batch", type=_whole_number_above_0, help="tiles a request (default: what the model takes at most)"
    )
    shared.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file with the API key for a gateway (default: the environment variable CLOTLINE_API_KEY)",
    )
    shared.add_argument(
        "--ca", type=Path, metavar="PEM", help="authority of the server's certificate (default: the system's)"
    )
    shared.add_argument("--certificate", type=Path, metavar="PEM", help="of this client, for mutual TLS")
    shared.add_argument("--certificate-key", type=Path, metavar="PEM", help="private key of --certificate")

    predict = commands.add_parser(
        "predict", parents=[shared], help="whole slides", description="Predict whole slides."
    )
    predict.add_argument("files", nargs="+", type=Path, metavar="SLIDE")
    predict.add_argument(
        "--heatmap-dir", type=Path, help="write <slide>.png here: tiles coloured by probability"
    )
    predict.add_argument(
        "--heatmap-class",
        help="class whose probability is drawn (default: the predicted one); a slide classifier's heatmap shows attention",
    )
    predict.add_argument(
        "--labels",
        type=Path,
        metavar="train.csv",
        help="label file: patients and true labels are taken from it",
    )
    predict.add_argument(
        "--um-per-px", type=_number_above_0, help="resolution of level 0 for slides that do not state theirs"
    )
    predict.set_defaults(run=_predict)

    classify = commands.add_parser(
        "classify",
        parents=[shared],
        help="images that are tiles",
        description="Classify images that are tiles.",
    )
    classify.add_argument("files", nargs="+", type=Path, metavar="TILE")
    classify.set_defaults(run=_classify)
    return parser


def _usage_problem(options: argparse.Namespace) -> str | None:
    if options.run is not _predict:
        return None
    counts = collections.Counter(path.stem for path in options.files)
    twice = sorted(stem for stem, count in counts.items() if count > 1)
    if twice:
        return (
            f"slides with the same name would count as one: {', '.join(twice)}; predict them in separate runs"
        )
    if options.labels is not None and options.labels.name != "train.csv":
        return f"--labels {options.labels}: the label file must be called train.csv"
    if options.heatmap_class and not options.heatmap_dir:
        return "--heatmap-class needs --heatmap-dir"
    return None


def _predict(client: SlideClient, options: argparse.Namespace) -> int:
    started_s = time.monotonic()
    records = _records(options.labels, client) if options.labels is not None else {}
    class_names = client.spec.class_names
    if options.model == AUTO:
        print(f"asking {client.model}", file=sys.stderr)
    if options.heatmap_class and options.heatmap_class not in class_names:
        print(
            f"error: --heatmap-class {options.heatmap_class!r}: the model knows {', '.join(class_names)}",
            file=sys.stderr,
        )
        return 2
    predictions: list[Prediction] = []
    heatmaps: dict[str, str] = {}
    failed: list[dict[str, str]] = []
    stopped: ClientError | None = None
    for path in _progress(options.files, "slides"):
        record = records.get(path.stem)
        try:
            prediction = client.predict(
                path, um_per_px=options.um_per_px, patient_id=record.patient_id if record else None
            )
            predictions.append(prediction)
            if options.json:
                print(_json(prediction.to_dict()), flush=True)
            if options.heatmap_dir:
                out = options.heatmap_dir / f"{path.stem}.png"
                write_heatmap(
                    out, path, prediction, class_name=options.heatmap_class, um_per_px=options.um_per_px
                )
                heatmaps[path.stem] = str(out)
        except OF_ONE_FILE as error:
            failed.append(_failure(path, error))
        except ClientError as error:
            stopped = error
            break
    patients = patient_predictions(predictions)
    if predictions and not options.json:
        truth = {image_id: record.label for image_id, record in records.items()}
        patient_truth = {record.patient_id: record.label for record in records.values()}
        print(slide_table(predictions, truth), "", patient_table(patients, patient_truth), "", sep="\n")
    document: dict[str, Any] = {
        "slides": [_without_tiles(entry, heatmaps) for entry in predictions],
        "patients": [entry.to_dict() for entry in patients],
        "failed": failed,
        "wall_s": round(time.monotonic() - started_s, 3),
    }
    return _finish(document, stopped)


def _classify(client: SlideClient, options: argparse.Namespace) -> int:
    started_s = time.monotonic()
    client.card  # noqa: B018 (a server that is not there is told before any tile)
    answers: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    stopped: ClientError | None = None
    for path in _progress(options.files, "tiles"):
        try:
            # One at a time, so that a bad image takes no good one with it.
            answer = client.classify([path.read_bytes()])
            class_names = client.spec.class_names  # of the release that answered
            probabilities = [round(float(value), 7) for value in answer.probabilities_NK[0]]
            entry: dict[str, Any] = {
                "tile": str(path),
                "label": class_names[int(answer.label_index_N[0])],
                "probabilities": dict(zip(class_names, probabilities, strict=True)),
            }
        except OF_ONE_FILE as error:
            failed.append(_failure(path, error))
            continue
        except ClientError as error:
            stopped = error
            break
        answers.append(entry)
        if options.json:
            print(_json(entry), flush=True)
        else:
            print(
                entry["label"],
                *(f"p({name})={value:.4f}" for name, value in entry["probabilities"].items()),
                path,
            )
    document = {"tiles": answers, "failed": failed, "wall_s": round(time.monotonic() - started_s, 3)}
    return _finish(document, stopped)


def _finish(document: dict[str, Any], stopped: ClientError | None) -> int:
    """Print the last line; tell what ended the run early."""
    print(_json(document), flush=True)
    if stopped is not None:
        raise stopped
    return 1 if document["failed"] else 0


def _records(labels: Path, client: SlideClient) -> dict[str, SlideRecord]:
    rows = read_labels(labels.parent, class_names=client.spec.class_names, require_files=False)
    return {row.image_id: row for row in rows}


def _failure(path: Path, error: Exception) -> dict[str, str]:
    message = str(error)
    print(f"error: {message if str(path) in message else f'{path}: {message}'}", file=sys.stderr)
    return {"file": str(path), "error": type(error).__name__, "message": message}


def _without_tiles(prediction: Prediction, heatmaps: dict[str, str]) -> dict[str, Any]:
    entry = prediction.to_dict()
    entry["tiles"] = len(prediction.tiles)
    entry["heatmap"] = heatmaps.get(prediction.image_id)
    return entry


def _progress(files: list[Path], unit: str) -> Iterable[Path]:
    """The files behind a progress bar, where there are several and someone looks."""
    return tqdm(files, unit=f" {unit}", disable=len(files) < 2 or not sys.stderr.isatty(), leave=False)


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _number_above_0(text: str) -> float:
    value = float(text)
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and at most 86400")
    return value


def _whole_number_above_0(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
