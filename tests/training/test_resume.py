"""training/resume.py: what is on the disk, and a run that goes on; test_train.py kills real processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training import resume, trainer
from training.errors import ResumeError
from training.processes import make_accelerator
from training.recipe import Recipe
from training.tile_task import TileTask

ABOUT = {
    "recipe": {"epochs": 3, "spec": {"class_names": ["CE", "LAA"]}},
    "versions": {"torch": "2"},
    "processes": 1,
}


def keeper_in(directory: Path, **changes: Any) -> resume.StateKeeper:
    return resume.StateKeeper(directory, {**ABOUT, **changes}, process=0, processes=1, save_every_s=0.0)


def filled(directory: Path, saves: int) -> None:
    keeper = keeper_in(directory)
    with keeper.training():
        for number in range(1, saves + 1):
            keeper.save({"number": number, "weights": torch.full((3,), float(number))}, {"own": number})


def test_the_newest_save_is_found_and_two_are_kept(tmp_path: Path) -> None:
    filled(tmp_path / "state", 4)
    keeper = keeper_in(tmp_path / "state")
    found = keeper.find()
    assert found is not None
    shared, own = keeper.load(found)
    assert (shared["number"], own["own"]) == (4, 4)
    assert torch.equal(shared["weights"], torch.full((3,), 4.0))
    names = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert names[-3:] == ["save-0000000002", "save-0000000003", "save-0000000004"] or len(names) == 3
    keeper.save({"number": 5}, {"own": 5})
    keeper.wait()
    assert (tmp_path / "state" / "save-0000000005").is_dir(), "numbers go on after the one that was loaded"


@pytest.mark.parametrize("damage", ["truncated", "empty", "altered", "missing", "only begun"])
def test_a_torn_save_is_never_used(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path / "state", 3)
    newest = tmp_path / "state" / "save-0000000003"
    (path,) = newest.iterdir()
    whole = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "altered":
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif damage == "missing":
        path.unlink()
    else:
        path.rename(newest / ".process-0.partial")
    keeper = keeper_in(tmp_path / "state")
    found = keeper.find()
    assert found is not None
    assert keeper.load(found)[0]["number"] == 2
    assert not newest.exists()
    assert "save-0000000003 is not whole" in capsys.readouterr().err


def test_a_save_needs_the_files_of_all_processes(tmp_path: Path) -> None:
    for process in (1, 0):
        keeper = resume.StateKeeper(tmp_path / "state", ABOUT, process=process, processes=2, save_every_s=0.0)
        assert not resume.has_saved(tmp_path / "state")
        (tmp_path / "state").mkdir(exist_ok=True)
        keeper.save({"number": process}, {"own": process})
        keeper.wait()
    assert resume.has_saved(tmp_path / "state")


def test_every_difference_is_named(tmp_path: Path) -> None:
    filled(tmp_path / "state", 1)
    changed = {"recipe": {"epochs": 4, "spec": {"class_names": ["CE", "LAA"]}}, "processes": 2}
    with pytest.raises(ResumeError, match=r"--restart to begin anew: 2 problems") as caught:
        keeper_in(tmp_path / "state", **changed).find()
    assert caught.value.problems == ("recipe.epochs was 3, is 4", "processes was 1, is 2")
    with pytest.raises(ResumeError, match=r"versions\.torch was '2', is '3'"):
        resume.goes_on(tmp_path / "state", {"versions": {"torch": "3"}})
    assert resume.goes_on(tmp_path / "state", {"versions": {"torch": "2"}})
    assert not resume.goes_on(tmp_path / "elsewhere", ABOUT)


def test_a_training_that_saved_nothing_may_be_followed_by_another(tmp_path: Path) -> None:
    keeper = keeper_in(tmp_path / "state")
    block = keeper.training()
    block.__enter__()  # and then a kill
    assert resume.goes_on(tmp_path / "state", ABOUT)
    assert not resume.goes_on(tmp_path / "state", {"processes": 5})
    assert keeper_in(tmp_path / "state", processes=5).find() is None


def test_an_error_leaves_no_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="halt"), keeper_in(tmp_path / "out" / "state").training():
        raise ValueError("halt")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_cannot_be_written_is_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keeper = keeper_in(tmp_path / "state")
    (tmp_path / "state").write_text("a file is in the way")
    keeper.save({}, {})
    keeper.wait()
    assert "cannot be saved" in capsys.readouterr().err


class Killed(Exception):
    """Stands for the kill; the processes of test_train.py get a real one."""


EVERYTHING = {
    "architecture": "mobilenet_v3_small",
    "epochs": 3,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "ema_decay": 0.8,
    "mixup_alpha": 0.3,
    "validation_share": 0.34,
    "early_stopping_patience": 2,
}


@pytest.mark.parametrize("kill_after", [1, 14, 30])
def test_an_interrupted_run_ends_with_the_same_bits(
    plan: Recipe,
    make_task: Callable[[Recipe], TileTask],
    tmp_path: Path,
    kill_after: int,
    whole: trainer.TrainingResult,
) -> None:
    changed = plan.model_copy(update=EVERYTHING)
    accelerator = make_accelerator(changed)

    def go(items: float) -> trainer.TrainingResult:
        task = make_task(changed)
        item = type(task.train_set).__getitem__
        left = [items]

        class Dying(type(task.train_set)):  # type: ignore[misc]
            def __getitem__(self, index: int) -> Any:
                if left[0] <= 0:
                    raise Killed
                left[0] -= 1
                return item(self, index)

        task.train_set.__class__ = Dying
        keeper = keeper_in(tmp_path / "state")
        with keeper.training():
            return trainer.train(changed, task, accelerator, keeper=keeper)

    with pytest.raises(Killed):
        go(kill_after)
    torch.manual_seed(1), np.random.seed(1)
    resumed = go(np.inf)
    assert set(resumed.model.state_dict()) == set(whole.model.state_dict())
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert np.array_equal(resumed.held_out_probabilities_NK, whole.held_out_probabilities_NK)
    assert resumed.best_epoch == whole.best_epoch
    for one, other in zip(resumed.history, whole.history, strict=True):
        assert {key: one[key] for key in ("epoch", "train_loss", "learning_rate")} == {
            key: other[key] for key in ("epoch", "train_loss", "learning_rate")
        }
    shutil.rmtree(tmp_path / "state")


@pytest.fixture(scope="module")
def whole(plan: Recipe, tile_dir: Path) -> trainer.TrainingResult:
    """The run that nothing interrupts."""
    from tests.training.conftest import split_of

    changed = plan.model_copy(update=EVERYTHING)
    return trainer.train(
        changed, TileTask.load(changed, tile_dir, split_of(tile_dir, changed)), make_accelerator(changed)
    )
