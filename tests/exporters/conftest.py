"""A real checkpoint with an untrained network: what an export does needs no trained one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from exporters.formats.interface import Network
from exporters.release import export_release
from slides.decode import encode_tile
from slides.spec import ModelSpec
from tests.conftest import draw_weights
from training import checkpoint, network

torch.set_num_threads(1)  # test processes share the cores

SIZE_PX = 64
MakeCheckpoint = Callable[..., Path]
Snapshot = dict[str, str]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Writes a checkpoint of a small torchvision network with blotchy tiles."""

    def make(
        *, classes: tuple[str, ...] = ("CE", "LAA"), size_px: int = SIZE_PX, tiles: int = 6, seed: int = 0
    ) -> Path:
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        spec = ModelSpec(
            class_names=classes,
            tile_size_px=128,
            um_per_px=0.5,
            input_size_px=size_px,
            tiles_per_slide=8,
            min_tissue_share=0.3,
        )
        blotches = rng.integers(0, 256, (tiles, 8, 8, 3), dtype=np.uint8)
        golden = [
            checkpoint.GoldenTile(
                image_id=f"p{number}_0",
                label=classes[number % 2],
                data=encode_tile(np.kron(blotch, np.ones((16, 16, 1), np.uint8)), 90),
                probabilities=(1 / len(classes),) * len(classes),
            )
            for number, blotch in enumerate(blotches)
        ]
        model = network.build("squeezenet1_1", spec).eval()
        draw_weights(model)
        return checkpoint.save(
            tmp_path_factory.mktemp("run") / "checkpoint",
            model,
            spec,
            architecture="squeezenet1_1",
            metrics={"tile_accuracy": 0.5},
            data={"fingerprint": "0" * 64, "slides": tiles, "patients": tiles, "held_out_patients": []},
            golden_tiles=golden,
            about={"git_commit": "0" * 40},
        )

    return make


@pytest.fixture(scope="session")
def checkpoint_dir(make_checkpoint: MakeCheckpoint) -> Path:
    """One checkpoint for all tests; do not change it."""
    return make_checkpoint()


@pytest.fixture(scope="session")
def release_dir(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of it as ONNX and TorchScript, whose answers no server was asked for; copy it to change it."""
    directory = tmp_path_factory.mktemp("released") / "a release"
    export_release(checkpoint_dir, directory, ["onnx", "torchscript"], served=False)
    return directory


@pytest.fixture(scope="session")
def loaded(checkpoint_dir: Path) -> checkpoint.Checkpoint:
    """The same, loaded."""
    return checkpoint.load(checkpoint_dir)


@pytest.fixture(scope="session")
def network_of(loaded: checkpoint.Checkpoint) -> Network:
    """Its network, as formats get it."""
    spec = loaded.spec
    return Network(loaded.model.backbone, spec.mean, spec.std, spec.input_size_px)


@pytest.fixture
def snapshot() -> Callable[[Path], Snapshot]:
    """Every file and directory under a path, with the digest of its bytes; hidden ones beside it included."""

    def take(root: Path) -> Snapshot:
        seen = {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else "directory"
            for path in sorted(root.rglob("*"))
        }
        return seen | {f"../{path.name}": "" for path in root.parent.glob(f".{root.name}.*")}

    return take
