"""Small real slides, tile files, and checkpoints of untrained networks: evaluation needs answers, not good ones."""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slides.decode import encode_tile
from slides.demo import make_demo_slides
from slides.labels import read_labels
from slides.spec import ModelSpec
from training import checkpoint, network
from training.evaluation import command, curves, plots

CLASS_NAMES = ("CE", "LAA")
SPEC = ModelSpec(
    class_names=CLASS_NAMES,
    tile_size_px=128,
    um_per_px=0.5,
    input_size_px=32,
    tiles_per_slide=6,
    min_tissue_share=0.3,
)
Save = Callable[..., Path]


@pytest.fixture(scope="session")
def slides_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 slides of 8 patients in 2 centres. Do not change it; copy it."""
    directory = tmp_path_factory.mktemp("slides") / "data"
    return make_demo_slides(
        directory, slides=10, patients=8, centers=2, seed=3, size_px=(1280, 1024), workers=2
    )


@pytest.fixture(scope="session")
def tiles_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 patients with 2 tiles each; centres 0 and 1 have both classes, centre "solo" has CE alone. Do not change it."""
    directory = tmp_path_factory.mktemp("tiles") / "data"
    (directory / "train").mkdir(parents=True)
    generator = np.random.default_rng(2)
    with (directory / "train.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("image_id", "center_id", "patient_id", "image_num", "label"))
        for patient in range(24):
            k = patient % 2
            centre = "solo" if patient in (4, 10, 16, 22) else str(patient // 2 % 2)
            for number in range(2):
                tile_HWC = generator.integers(0, 256, (48, 48, 3)) // 2 + generator.integers(0, 128, 3)
                (directory / "train" / f"p{patient:02d}_{number}.jpg").write_bytes(
                    encode_tile(tile_HWC.astype(np.uint8), 90)
                )
                writer.writerow(
                    (f"p{patient:02d}_{number}", centre, f"p{patient:02d}", number, CLASS_NAMES[k])
                )
    return directory


@pytest.fixture(scope="session")
def save_tile_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Writes the checkpoint of an untrained network that held out the patients given."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def save(
        name: str, data_dir: Path, held_out: Sequence[str], *, seed: int = 0, recipe: dict[str, Any] | None = None, **data: Any
    ) -> Path:  # fmt: skip
        torch.manual_seed(seed)
        model = network.build("shufflenet_v2_x0_5", SPEC)
        spread_answers(model.eval())
        records = read_labels(data_dir, class_names=CLASS_NAMES)
        facts = {
            "fingerprint": "0" * 64,
            "held_out_patients": sorted(held_out),
            "held_out_slides": [one.image_id for one in records if one.patient_id in held_out],
            "train_patients": sorted({one.patient_id for one in records} - set(held_out)),
            "validation_patients": [],
            **data,
        }
        return checkpoint.save(
            folder / name / "checkpoint",
            model.eval(),
            SPEC,
            architecture="shufflenet_v2_x0_5",
            metrics={"tile_accuracy": 0.5},
            data={key: value for key, value in facts.items() if value is not None},
            golden_tiles=[],
            about={"recipe": recipe or {"seed": seed}, "git_commit": "0123abc", "versions": {"torch": "2"}},
            overwrite=True,
        )

    return save


def spread_answers(model: network.TileNetwork) -> None:
    """Scale the last layer so that answers differ from tile to tile, as those of a trained network do."""
    generator = np.random.default_rng(0)
    colours_N113 = generator.integers(60, 250, (32, 1, 1, 3))
    tiles_NHWC = np.clip(colours_N113 + generator.normal(0, 30, (32, 32, 32, 3)), 0, 255).astype(np.uint8)
    last = model.backbone.fc
    with torch.no_grad():
        logits_NK = model(torch.from_numpy(tiles_NHWC))
        scale_K = 1.5 / logits_NK.std(dim=0)
        last.bias.sub_(logits_NK.mean(dim=0)).mul_(scale_K)
        last.weight.mul_(scale_K[:, None])


@pytest.fixture(scope="session", autouse=True)
def _coarse_charts() -> Iterator[None]:
    """Fewer pixels and resamples: the tests draw some hundred charts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "DPI", 70)
        patch.setattr(curves, "BAND_REPLICATES", 60)
        yield


def patients_of(data_dir: Path) -> list[str]:
    """Sorted patient ids of a data set."""
    return sorted({record.patient_id for record in read_labels(data_dir, class_names=CLASS_NAMES)})


def options(*words: str | Path) -> argparse.Namespace:
    """The command's options as they are typed."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def table_of(out_dir: Path) -> list[dict[str, str]]:
    """The rows of predictions.csv."""
    with (out_dir / "predictions.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def copied_slides(slides_dir: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(slides_dir, tmp_path / "copied slides")
