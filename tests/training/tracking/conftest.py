"""A store that is made once and copied, a small checkpoint, and runs whose journals are written by hand."""

from __future__ import annotations

import json
import os
import shutil
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slides.decode import encode_tile
from slides.spec import ModelSpec
from training.tracking import TrackingOptions, run


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `store.configure` sets for its process does not outlive a test."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated MLflow database without runs; copy it, do not write to it."""
    from training.tracking import store

    before = dict(os.environ)
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    store.connect(f"sqlite:///{path}").search_experiments()
    os.environ.clear()
    os.environ.update(before)
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> Path:
    """A database of the test's own, in a folder with a space."""
    path = tmp_path / "tracking store" / "mlflow.db"
    path.parent.mkdir()
    shutil.copy(empty_database, path)
    return path


@pytest.fixture
def uri(database: Path) -> str:
    return f"sqlite:///{database}"


@pytest.fixture
def client(uri: str) -> Any:
    from training.tracking import store

    return store.connect(uri)


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network of random weights, as training saves it."""
    import torch

    from training import checkpoint, network

    torch.manual_seed(0)
    spec = ModelSpec(
        class_names=("CE", "LAA"),
        tile_size_px=48,
        um_per_px=0.5,
        input_size_px=32,
        tiles_per_slide=1,
        min_tissue_share=0.0,
    )
    model = network.build("shufflenet_v2_x0_5", spec).eval()
    data = encode_tile(np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8), 90)
    return checkpoint.save(
        tmp_path_factory.mktemp("trained model") / "final",
        model,
        spec,
        architecture="shufflenet_v2_x0_5",
        metrics={"slide_roc_auc": 0.75},
        data={"fingerprint": "f" * 64},
        golden_tiles=[checkpoint.GoldenTile("a", "CE", data, (0.5, 0.5))],
    )


@pytest.fixture
def journal_of(uri: str, tmp_path: Path, checkpoint_dir: Path) -> Callable[..., Path]:
    """`write_journal` for the test's own store."""

    def write(*, to: str = uri, run_dir: Path = tmp_path / "run 1", **values: Any) -> Path:
        return write_journal(to, run_dir, checkpoint_dir, **values)

    return write


def write_journal(
    uri: str,
    run_dir: Path,
    checkpoint_dir: Path,
    *,
    steps: range = range(3),
    end: str | None = "FINISHED",
    register: str | None = None,
    checkpoint: bool = True,
    resume: bool = False,
) -> Path:
    """Track a whole small run without sending it; returns the folder of its journal."""
    with unittest.mock.patch.object(run.SenderProcess, "start"):
        run_dir.mkdir(exist_ok=True, parents=True)
        (run_dir / "held_out.csv").write_text(HELD_OUT)
        (run_dir / "history.json").write_text(json.dumps(HISTORY))
        tracking = run.start_run(
            TrackingOptions(trackers=("mlflow",), uri=uri, experiment="tests", register=register),
            recipe={"seed": 3, "spec": {"class_names": ["CE", "LAA"]}},
            data={"fingerprint": "f" * 64, "slides": 4, "path": "/data/clots"},
            run_dir=run_dir,
            run_name="small",
            resume=resume,
            command_line=["train.py", "--recipe", "small"],
        )
        for step in steps:
            tracking.log({"train_loss": 1.0 / (step + 1)}, step=step)
        assert tracking.directory is not None
        if end is not None:
            tracking.finish(
                status=end,
                metrics={"slide_roc_auc": 0.75},
                checkpoint=checkpoint_dir if checkpoint else None,
                files=[run_dir / "held_out.csv", run_dir / "history.json"],
            )
    return tracking.directory


HELD_OUT = "image_id,patient_id,center_id,label,p_CE,p_LAA\na,1,1,CE,0.9,0.1\nb,2,1,LAA,0.6,0.4\n"
HISTORY = [{"epoch": 1, "train_loss": 0.5}, {"epoch": 2, "train_loss": 0.25, "accuracy": 0.5}]


def runs_in(client: Any) -> list[Any]:
    """All runs of the store."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments))


def history_of(client: Any, mlflow_run_id: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, as often as it is in the store."""
    return [(m.step, m.value) for m in client.get_metric_history(mlflow_run_id, name)]
