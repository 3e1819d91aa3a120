"""The path from slides to a report. Reads like its table of contents: `walk`."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clients.errors import ClientError
from demo import triton_metrics
from demo.errors import DemoError
from demo.outcome import Outcome
from demo.parity import Parity, held_out_tiles, image_differences, served_parity, torch_probabilities
from demo.report import render
from demo.scores import by_patient, scored
from demo.stages import ROOT, Stages, say
from slides.errors import SlidesError
from slides.labels import SlideRecord, read_labels
from slides.spec import ModelSpec
from training.errors import TrainingError

READY_S = 180.0
ARTEFACTS = ("training", "release", "heatmaps", "report.html", "summary.json")
FORMER_ARTEFACTS = ("model_repository",)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run is asked for.

    Attributes:
        out: folder of everything that the run writes.
        data: folder with train.csv and train/; None generates slides in `out`/data, or keeps those that are
            there.
        recipe: name or path of the training recipe.
        formats: what to export, the first one becomes `tile_classifier`.
        least_patient_auc: bar for the ROC AUC over held-out patients; None for no bar.
    """

    out: Path
    data: Path | None
    recipe: str
    formats: tuple[str, ...]
    least_patient_auc: float | None


def walk(options: Options) -> Outcome:
    """Walk the whole path, and replace what an earlier run left in `options.out` once everything is there.

    Raises:
        DemoError, SlidesError, ClientError: a stage failed; nothing but its log was written.
    """
    started_s = time.monotonic()
    with _build_folder(options.out) as build:
        count = 6 + len(options.formats) + (options.data is None)
        stages = Stages(_fresh_logs(options.out), count, later={build: options.out})
        data = options.data or _generate(stages, options.out / "data")
        runs = options.out.resolve().parent / "mlflow.db"
        trained = _train(stages, data, options.recipe, build / "training", f"sqlite:///{runs}")
        release = build / "release"
        export = _export(stages, trained.checkpoint, release, options.formats)
        records = read_labels(data, class_names=trained.spec.class_names)
        held_out = [record for record in records if record.image_id in trained.held_out_ids]
        with _serve(stages, release / "models") as server:
            before = triton_metrics.settled(server["metrics"])
            answers = _predict(stages, server["http"], held_out, trained, data, build / "heatmaps")
            with stages.timed("torch", "compute every held-out tile with PyTorch"):
                tiles = held_out_tiles(held_out, trained.spec, trained.source)
                every_tile = [data for of_image in tiles.values() for data in of_image]
                torch_NK = torch_probabilities(trained.checkpoint, every_tile)
            parity = {}
            for number, name in enumerate(options.formats):
                # Both protocols are used: HTTP for the first format, gRPC for the others.
                url = f"grpc://{server['grpc']}" if number else f"http://{server['http']}"
                model = f"tile_classifier_{name}" if number else "tile_classifier"
                with stages.timed(f"parity-{name}", f"ask {model} ({name}, {url}) for every held-out tile"):
                    parity[name] = served_parity(url, model, every_tile, torch_NK)
                say(f"      {_in_words(parity[name])}")
            counts = triton_metrics.difference(before, triton_metrics.settled(server["metrics"]))
        images = [scored(record.image_id, record.label, answers[record.image_id]) for record in held_out]
        patient_of_image = {record.image_id: record.patient_id for record in records}
        with stages.timed("report", "write the report"):
            outcome = Outcome(
                synthetic=options.data is None,
                recipe=options.recipe,
                source=trained.source,
                slides=len(records),
                patients=len({record.patient_id for record in records}),
                centres=len({record.center_id for record in records}),
                manifest=trained.manifest,
                history=trained.history,
                export=export,
                images=images,
                held_out_patients=by_patient(images, patient_of_image),
                parity=parity,
                image_max_abs_diff=image_differences(answers, tiles, torch_NK),
                counts=counts,
                heatmaps={path.stem: path for path in sorted((build / "heatmaps").glob("*.png"))},
                stages=tuple(stages.finished),
                wall_s=time.monotonic() - started_s,
                least_patient_auc=options.least_patient_auc,
            )
            (build / "report.html").write_text(render(outcome), encoding="utf-8")
            summary = json.dumps(outcome.summary(), indent=2, ensure_ascii=False, allow_nan=False)
            (build / "summary.json").write_text(summary + "\n", encoding="utf-8")
            _publish(build, options.out)
    return outcome


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training left behind.

    Attributes:
        source: "slides", or "tiles" where every image is one tile.
        held_out_ids: image_ids that were not trained on.
    """

    checkpoint: Path
    manifest: dict[str, Any]
    history: list[dict[str, Any]]
    spec: ModelSpec
    source: str
    held_out_ids: frozenset[str]


def _generate(stages: Stages, data: Path) -> Path:
    stages.run("slides", "make synthetic slides (kept if they are there)", ["slides", "demo", "--out", data])
    return data


def _train(stages: Stages, data: Path, recipe: str, out: Path, tracking_uri: str) -> Trained:
    launch: list[str | Path] = ["accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    script: list[str | Path] = [
        ROOT / "training" / "train.py",
        "--recipe",
        recipe,
        "--data",
        data,
        "--out",
        out,
        "--experiment",
        "demo",
        "--tracking-uri",
        tracking_uri,
    ]
    stages.run("train", "train a network", [*launch, *script])
    checkpoint = out / "checkpoint"
    manifest = _read_json(checkpoint / "checkpoint.json")
    with (out / "held_out.csv").open(encoding="utf-8", newline="") as stream:
        held_out_ids = frozenset(row["image_id"] for row in csv.DictReader(stream))
    return Trained(
        checkpoint,
        manifest,
        _read_json(out / "history.json"),
        ModelSpec.from_dict(manifest["spec"]),
        str(manifest["recipe"]["source"]),
        held_out_ids,
    )


def _export(stages: Stages, checkpoint: Path, release: Path, formats: Sequence[str]) -> dict[str, Any]:
    return stages.run(
        "export",
        "export the network as a release, checked against PyTorch here and through a server",
        ["exporters", "export", checkpoint, "--release", release, "--formats", ",".join(formats), "--strict"],
    )[-1]


@contextlib.contextmanager
def _serve(stages: Stages, repository: Path) -> Iterator[dict[str, Any]]:
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    with stages.serve(
        "serve",
        "start Triton Inference Server",
        ["serving", "up", "--repository", repository, *ports],
        READY_S,
    ) as server:
        yield server


def _predict(
    stages: Stages, http: str, held_out: Sequence[SlideRecord], trained: Trained, data: Path, heatmaps: Path
) -> dict[str, dict[str, float]]:
    """image_id -> class name -> probability, as the client answers."""
    files = [record.path for record in held_out]
    if trained.source == "tiles":
        command: list[str | Path] = ["clients", "classify", *files, "--url", http, "--json"]
    else:
        command = ["clients", "predict", *files, "--url", http, "--json", "--labels", data / "train.csv"]
        command += ["--heatmap-dir", heatmaps]
    title = f"ask the server for {len(held_out)} held-out {trained.source}"
    document = stages.run("predict", title, command)[-1]
    if trained.source == "tiles":
        return {Path(entry["tile"]).stem: entry["probabilities"] for entry in document["tiles"]}
    return {entry["image_id"]: entry["probabilities"] for entry in document["slides"]}


def _in_words(parity: Parity) -> str:
    return f"{parity.tiles} tiles, max |dp| {parity.max_abs_diff:.1e}, {parity.label_mismatches} other labels"


@contextlib.contextmanager
def _build_folder(out: Path) -> Iterator[Path]:
    """A fresh folder beside what is there, removed at the end; one run at a time in `out`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise DemoError(
            f"cannot write to {out}: {error.strerror}; choose another folder with --out"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoError(
                f"another demo is running in {out}; wait for it or choose another --out"
            ) from None
        build = out / ".build"
        shutil.rmtree(build, ignore_errors=True)  # of a run that was killed
        build.mkdir()
        try:
            yield build
        finally:
            shutil.rmtree(build, ignore_errors=True)


def _fresh_logs(out: Path) -> Path:
    logs = out / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    return logs


def _publish(build: Path, out: Path) -> None:
    """Put the new artefacts in place of the old ones; the summary goes last."""
    replaced = build / "replaced"
    replaced.mkdir()
    for name in (*ARTEFACTS, *FORMER_ARTEFACTS):
        if (out / name).is_dir():
            os.rename(out / name, replaced / name)
        if (build / name).exists():
            os.replace(build / name, out / name)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DemoError(f"cannot read {path}, which training should have written: {error}") from error


STAGE_ERRORS = (DemoError, SlidesError, ClientError, TrainingError)
