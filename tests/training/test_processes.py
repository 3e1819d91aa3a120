"""training/processes.py: launches that would quietly do something else than was asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from slides.errors import LabelsError
from training import processes
from training.errors import DataError, LaunchError
from training.recipe import Recipe


def lonely(**changes: Any) -> Any:
    """What Accelerate gives a process that did not find the others."""
    usual = {"num_processes": 1, "distributed_type": DistributedType.NO, "device": torch.device("cpu")}
    return SimpleNamespace(**{**usual, **changes})


def test_processes_that_do_not_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match=r"2 processes were started, but they train as 1; .*torchrun"):
        processes._refuse_loners(lonely())
    processes._refuse_loners(lonely(num_processes=2))


def test_one_process_where_several_were_meant(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    processes._refuse_loners(lonely())
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    processes._refuse_loners(lonely())
    assert "leave --cpu out" in capsys.readouterr().err


def test_sharding_that_accelerate_would_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    processes._refuse_other_sharding(lonely())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(LaunchError, match="shards on several GPUs only"):
        processes._refuse_other_sharding(lonely())
    with pytest.raises(LaunchError, match="--fsdp_version 2"):
        processes._refuse_other_sharding(lonely(distributed_type=DistributedType.FSDP, is_fsdp2=False))
    processes._refuse_other_sharding(lonely(distributed_type=DistributedType.FSDP, is_fsdp2=True))


def test_a_process_gets_its_share_of_the_cores(plan: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    try:
        monkeypatch.setattr(processes, "usable_cores", lambda: 6)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        processes.make_accelerator(plan)
        assert torch.get_num_threads() == 1
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        processes.make_accelerator(plan)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("error", [DataError("here", ["one"]), LabelsError("there", ["two"])])
def test_errors_of_the_main_process_are_raised(error: Exception) -> None:
    def failing() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        processes.on_main_process(failing)
    assert str(caught.value) == str(error)
    assert processes.on_main_process(lambda: {"answer": 42}) == {"answer": 42}
