"""python -m exporters.benchmarks drift [--patients 90] [--window-s 30] [--tiles-a-second 60]

Does drift show, and only drift? Made-up slides are divided by patient into three: one third trains a small network, one is
held out and becomes the release's reference profile, one is what a hospital sends. The release is served by a real
tritonserver; a real Prometheus with docker/prometheus/rules/drift.yml watches it. Of the rules only times are changed: both
windows are `--window-s` seconds, and the alert waits a second in place of half an hour.

Sent are, for a window each, the third patients' tiles as they are; with other amounts of stain; and blurred.
Passed: nothing fires at first; red_density_share fires for the stain, sharpness for the blur.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from exporters.errors import ExportError, UnavailableError
from exporters.proving_server import ProvingServer, proving_server
from exporters.triton_config import CLASSIFIER_MODEL, OUTPUTS
from slides.appearance import STATISTICS
from slides.decode import decode_tile, encode_tile
from slides.spec import ModelSpec

RULES = Path(__file__).resolve().parents[2] / "docker" / "prometheus" / "rules" / "drift.yml"
PROGRAM = "prometheus"
TILES_A_SLIDE = 2
SETTLE_S = 4.0
PATIENCE = 3
FIRING = 'ALERTS{alertname="DriftDetected",alertstate="firing",window="1h"}'
READY_S = 60.0
SIDE_PX = 1024
OTHER_STAIN = np.array((1.7, 1.0, 0.8))
"""Factors of the optical density in red, green and blue: more haematoxylin, less eosin."""
BLUR_PX = 1.5

Tile = NDArray[np.uint8]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--patients", type=int, default=90, metavar="N", help="a slide each; 36 or more")
    parser.add_argument(
        "--window-s", type=int, default=30, metavar="S", help="both windows of the rules, 8 or more"
    )
    parser.add_argument("--tiles-a-second", type=float, default=60.0, metavar="N", help="sent, 10 or more")
    parser.add_argument("--epochs", type=int, default=4, metavar="N", help="of the training")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train, release, serve, watch; see the module.

    Raises:
        UnavailableError: there is no Prometheus, or no tritonserver.
        ExportError: one of the parts failed.
    """
    if shutil.which(PROGRAM) is None:
        raise UnavailableError("Prometheus is not installed: apt-get install prometheus.")
    least = {"patients": 36, "window_s": 8, "tiles_a_second": 10, "epochs": 1}
    if any(not getattr(options, name) >= bound for name, bound in least.items()):  # nan is no rate either
        said = ", ".join(f"--{name.replace('_', '-')} {bound} or more" for name, bound in least.items())
        raise UnavailableError(f"What can be measured: {said}.")
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="clotline-drift-") as scratch_name:
        scratch = Path(scratch_name)
        with _timed("slides", seconds):
            known, unseen = _divided(scratch, options.patients)
        with _timed("training", seconds):
            checkpoint = _trained(scratch / "checkpoint", known, options.epochs)
        with _timed("export", seconds):
            release = scratch / "release"
            profile = _released(checkpoint, release)
        tiles = _cut(unseen)
        with (
            proving_server(release / "models", [CLASSIFIER_MODEL], announce=lambda text: None) as server,
            _watching(scratch, server, options.window_s) as prometheus,
            _timed("serving", seconds),
        ):
            found = {
                kind: _sent(kind, [change(tile) for tile in tiles], server, prometheus, options)
                for kind, change in CHANGES.items()
            }
    passed = (
        not found["same"]["firing"]
        and {"class", *STATISTICS} <= set(found["same"]["psi"])
        and all(statistic in found[kind]["firing"] for kind, statistic in SHOWN_BY.items())
    )
    return {
        "benchmark": "drift",
        "passed": passed,
        "reference_patients": profile["patients"],
        "reference_tiles": profile["count"],
        "sent_tiles": len(tiles),
        "window_s": options.window_s,
        **found,
        "seconds": seconds,
        "exit_code": 0 if passed else 1,
    }


def _same(tile_HWC: Tile) -> Tile:
    return tile_HWC


def _stained(tile_HWC: Tile) -> Tile:
    """Beer and Lambert's law with other densities."""
    density_HWC = -np.log((tile_HWC.astype(np.float64) + 1) / 256)
    return np.clip(256 * np.exp(-density_HWC * OTHER_STAIN) - 1, 0, 255).round().astype(np.uint8)


def _blurred(tile_HWC: Tile) -> Tile:
    return np.asarray(cv2.GaussianBlur(tile_HWC, (0, 0), BLUR_PX), np.uint8)


CHANGES: Mapping[str, Callable[[Tile], Tile]] = {"same": _same, "stain": _stained, "blur": _blurred}
SHOWN_BY = {"stain": "red_density_share", "blur": "sharpness"}
"""What has to fire for which change."""


def _divided(scratch: Path, patients: int) -> tuple[Path, Path]:
    """Two folders of slides: two thirds of the patients, and one. Every class and centre is in both alike."""
    from slides.demo import make_demo_slides

    demo = make_demo_slides(
        scratch / "demo", slides=patients, patients=patients, centers=3, size_px=(SIDE_PX, SIDE_PX)
    )
    with (demo / "train.csv").open(newline="") as stream:
        rows = sorted(
            csv.DictReader(stream), key=lambda row: (row["center_id"], row["label"], row["image_id"])
        )
    folders = []
    for name, own in (
        ("known", [row for place, row in enumerate(rows) if place % 3]),
        ("unseen", rows[::3]),
    ):
        folder = scratch / name
        (folder / "train").mkdir(parents=True)
        with (folder / "train.csv").open("w", newline="") as stream:
            table = csv.DictWriter(stream, list(rows[0]))
            table.writeheader()
            table.writerows(own)
        for row in own:
            file = f"{row['image_id']}.tif"
            (folder / "train" / file).symlink_to(demo / "train" / file)
        folders.append(folder)
    return folders[0], folders[1]


def _spec() -> ModelSpec:
    return ModelSpec(
        class_names=("CE", "LAA"),
        tile_size_px=256,
        um_per_px=0.5,
        input_size_px=96,
        tiles_per_slide=TILES_A_SLIDE,
        min_tissue_share=0.3,
    )


def _trained(directory: Path, data: Path, epochs: int) -> Path:
    """A checkpoint as training writes it, half of the patients held out."""
    from exporters.parity import one_torch_thread
    from slides.labels import read_labels
    from training import processes, trainer
    from training.folds import split_by_patient
    from training.recipe import Recipe
    from training.task import Split
    from training.tile_task import TileTask

    plan = Recipe(
        source="slides",
        spec=_spec(),
        architecture="resnet18",
        epochs=epochs,
        batch_size=16,
        learning_rate=1e-3,
        folds=2,
        seed=7,
    )
    records = read_labels(data, class_names=plan.spec.class_names)
    train, held_out = split_by_patient(records, folds=2, held_out_fold=0, seed=plan.seed)
    task = TileTask.load(plan, data, Split(tuple(train), (), tuple(held_out)))
    with one_torch_thread():  # two would wait for one another wherever something else runs
        result = trainer.train(plan, task, processes.make_accelerator(plan, []))
    return task.save(
        directory, result.model, result.held_out_probabilities_NK, metrics={}, about={}, overwrite=False
    )


def _released(checkpoint: Path, directory: Path) -> dict[str, Any]:
    """Export it; returns the size of its profile of looks."""
    from exporters.release import export_release

    released = export_release(checkpoint, directory, ["onnx"], served=False)
    reference = released.manifest.reference if released.manifest else None
    if reference is None or reference.appearance is None:
        raise ExportError("The release has no reference profile.")
    return {"patients": reference.appearance.patients, "count": reference.appearance.count}


def _cut(data: Path) -> list[Tile]:
    from slides.labels import read_labels
    from training.tiles import collect_tiles

    spec = _spec()
    records = read_labels(data, class_names=spec.class_names)
    return [
        decode_tile(tile, spec.tile_size_px)
        for slide in collect_tiles(records, "slides", spec, show_progress=False)
        for tile in slide.tiles
    ]


@contextlib.contextmanager
def _watching(scratch: Path, server: ProvingServer, window_s: int) -> Iterator[str]:
    """A Prometheus that scrapes Triton and its supervisor every second; gives its address."""
    rules = RULES.read_text()
    for told, instead in (
        (r"\[(1h|24h)\]", f"[{window_s}s]"),
        (r"interval: 1m", "interval: 1s"),
        (r"for: 30m", "for: 1s"),
    ):
        rules, count = re.subn(told, instead, rules)
        if not count:
            raise ExportError(f"{RULES} has no {told}, which is to be {instead} here.")
    (scratch / "rules.yml").write_text(rules)
    jobs = {"triton": server.metrics, "supervisor": server.health}
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [
            {
                "job_name": job,
                "static_configs": [{"targets": [_authority(address)], "labels": {"server": "clotline"}}],
            }
            for job, address in jobs.items()
        ],
    }
    (scratch / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    said = (scratch / "prometheus.log").open("w+")
    command = [PROGRAM, f"--config.file={scratch / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={scratch / 'tsdb'}", f"--web.listen-address={address}"]
    process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline_s = time.monotonic() + READY_S
        while not _answers(f"http://{address}/-/ready"):
            if process.poll() is not None or time.monotonic() > deadline_s:
                said.seek(0)
                last = (said.read().splitlines() or ["it said nothing"])[-1]
                raise ExportError(f"Prometheus did not become ready: {last}")
            time.sleep(0.1)
        yield f"http://{address}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        said.close()


def _authority(address: str) -> str:
    return address.partition("://")[2].partition("/")[0] or address


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310  our own http:// address  # nosec B310
            return bool(answer.status == 200)
    except OSError:
        return False


def _sent(
    kind: str, tiles: Sequence[Tile], server: ProvingServer, prometheus: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Send tiles in a random order until the window holds nothing else; returns what Prometheus makes of it.

    For a change, at most PATIENCE windows more, until its alert fires: on a slow machine rules are evaluated late.
    """
    encoded = [encode_tile(tile_HWC, 90) for tile_HWC in tiles]
    generator = np.random.default_rng(0)
    places = itertools.chain.from_iterable(
        generator.permutation(len(encoded)).tolist() for _ in itertools.count()
    )
    began_s = time.monotonic()
    window_s = options.window_s
    span_s, longest_s = window_s + SETTLE_S, (1 + PATIENCE) * window_s + SETTLE_S
    with tqdm(
        total=span_s, desc=kind, bar_format="{desc} {bar} [{elapsed}]", leave=False, mininterval=1
    ) as bar:
        for count, place in enumerate(places, 1):
            tile = np.array([[encoded[place]]], np.object_)
            server.ask("grpc", CLASSIFIER_MODEL, {"tile": tile}, OUTPUTS)
            time.sleep(max(0.0, began_s + count / options.tiles_a_second - time.monotonic()))
            passed_s = time.monotonic() - began_s
            bar.update(min(passed_s, bar.total) - bar.n)
            if passed_s < span_s:
                continue
            firing = _by_quantity(prometheus, FIRING)
            if SHOWN_BY.get(kind) in {None, *firing} or passed_s >= longest_s:
                break
            span_s += 1
    hour = '{window="1h"}'
    psi, chance, patients = (
        _by_quantity(prometheus, f"clotline:{name}{hour}")
        for name in ("drift_psi", "drift_psi_by_chance", "drift_patients")
    )
    return {
        "sent": count,
        "firing": sorted(firing),
        "psi": psi,
        "fires_above": {name: round(0.25 + value, 3) for name, value in chance.items()},
        "patients_worth": patients,
    }


def _by_quantity(prometheus: str, query: str) -> dict[str, float]:
    """Statistic, or the quantity that has none -> value now."""
    url = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  our own http:// address  # nosec B310
            found = json.load(answer)["data"]["result"]
    except urllib.error.URLError as error:
        raise ExportError(f"Prometheus did not answer {query}: {error}.") from error
    return {
        sample["metric"].get("statistic") or sample["metric"]["quantity"]: round(float(sample["value"][1]), 3)
        for sample in found
    }


@contextlib.contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    began_s = time.monotonic()
    yield
    seconds[stage] = round(time.monotonic() - began_s, 1)
