"""Real slide and tile checkpoints of small untrained networks, an ensemble of them, and a tritonserver over the three."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from slides.decode import encode_tile
from slides.spec import ModelSpec
from training import checkpoint as tile_checkpoint
from training import network
from training.ensembles.combination import Combination
from training.ensembles.definition import Abstention, Ensemble, Member
from training.ensembles.stacking import MetaLearner
from training.mil import checkpoint as slide_checkpoint
from training.mil.network import build_encoder, build_head
from training.mil.options import BagOptions

torch.set_num_threads(1)  # test processes share the cores

SPEC = ModelSpec(
    class_names=("CE", "LAA", "other"),
    tile_size_px=64,
    um_per_px=0.5,
    input_size_px=32,
    tiles_per_slide=8,
    min_tissue_share=0.3,
)
MakeSlides = Callable[..., Path]


def blotchy_tiles(count: int, seed: int) -> tuple[bytes, ...]:
    """JPEG tiles of 64 px, each of 16 colours."""
    blotches = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return tuple(encode_tile(np.kron(blotch, np.ones((16, 16, 1), np.uint8)), 90) for blotch in blotches)


def spread_out(backbone: torch.nn.Module) -> None:
    """Weights with which an untrained squeezenet tells tiles apart."""
    for parameter in backbone.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)


@pytest.fixture(scope="session")
def make_slides(tmp_path_factory: pytest.TempPathFactory) -> MakeSlides:
    """Writes a slide checkpoint whose golden bags have 3, 1 and 5 tiles."""

    def make(*, seed: int = 0, spec: ModelSpec = SPEC, **bags: object) -> Path:
        torch.manual_seed(seed)
        options = BagOptions(
            **{"tiles": 8, "choice": "random", "attention_dim": 8, "embedding_dim": 16, **bags}
        )
        encoder = build_encoder("squeezenet1_1", spec, options).module.eval()
        spread_out(encoder.backbone)
        head = build_head(encoder.feature_dim, spec, options).eval()
        torch.nn.init.normal_(head.classifier.weight, std=1.0)
        served = slide_checkpoint.SlideCheckpoint(encoder, head, spec, options, {}, ())
        golden = []
        for number, tiles in enumerate((3, 1, 5)):
            encoded = blotchy_tiles(tiles, 10 + number)
            answer = served.answer(encoded)
            golden.append(
                slide_checkpoint.GoldenBag(
                    f"p{number}_0",
                    spec.class_names[number % len(spec.class_names)],
                    encoded,
                    tuple(map(float, answer.probabilities_K)),
                    tuple(map(float, answer.attention_T)),
                )
            )
        return slide_checkpoint.save(
            tmp_path_factory.mktemp("slides") / "checkpoint",
            encoder,
            head,
            spec,
            architecture="squeezenet1_1",
            bags=options,
            metrics={"slide_accuracy": 0.5},
            data={"fingerprint": "0" * 64, "train_patients": ["t0"], "held_out_patients": ["p0", "p1", "p2"]},
            golden_bags=golden,
        )

    return make


@pytest.fixture(scope="session")
def slide_dir(make_slides: MakeSlides) -> Path:
    """One slide checkpoint for all tests; do not change it."""
    return make_slides()


@pytest.fixture(scope="session")
def tile_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tile checkpoint of the same geometry, its classes in another order; two of its six golden tiles are of one slide."""
    torch.manual_seed(3)
    spec = dataclasses.replace(SPEC, class_names=("other", "CE", "LAA"), mean=(0.5, 0.5, 0.5))
    model = network.build("squeezenet1_1", spec).eval()
    spread_out(model.backbone)
    golden = [
        tile_checkpoint.GoldenTile(f"q{number // 2}_0", spec.class_names[number // 2], tile, (1 / 3,) * 3)
        for number, tile in enumerate(blotchy_tiles(6, 20))
    ]
    return tile_checkpoint.save(
        tmp_path_factory.mktemp("tiles") / "checkpoint",
        model,
        spec,
        architecture="squeezenet1_1",
        metrics={"tile_accuracy": 0.5},
        data={"fingerprint": "0" * 64, "held_out_patients": ["q0"]},
        golden_tiles=golden,
    )


@pytest.fixture(scope="session")
def ensemble_path(slide_dir: Path, tile_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack of both, with temperature and abstention."""
    rng = np.random.default_rng(2)
    meta = MetaLearner("regression", rng.normal(0, 0.3, (3, 6)), rng.normal(0, 1, 3))
    members = (Member("learner", "0" * 64, str(slide_dir)), Member("tiles", "0" * 64, str(tile_dir)))
    combination = Combination("stack", np.array([0.5, 0.5]), meta, 0.8)
    path = tmp_path_factory.mktemp("ensemble") / "ensemble.json"
    scores = {"patient": {"roc_auc": 0.75}}
    Ensemble(SPEC.class_names, members, combination, Abstention(0.1, 0.6, 40), scores=scores).save(path)
    return path
