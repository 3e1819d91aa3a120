"""`tile_preprocess` on a real tritonserver: what its configuration asks of the process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from exporters.triton_config import preprocess_config, to_text
from serving.processes import processes_of
from tests.serving.conftest import Launch
from tests.serving.test_launcher import state_of

CODE = Path(__file__).parents[2] / "model_repository" / "tile_preprocess" / "1" / "model.py"


def add_preprocess(repository: Path, niceness: int) -> None:
    config = preprocess_config(
        input_size_px=64,
        max_batch=4,
        instances=2,
        max_tile_bytes=1 << 20,
        max_tile_pixels=1 << 20,
        niceness=niceness,
    )
    version = repository / config.name / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_bytes(CODE.read_bytes())
    (version.parent / "config.pbtxt").write_text(to_text(config))


def test_it_gives_way_to_the_other_models(tiny_repository: Path, launch: Launch) -> None:
    add_preprocess(tiny_repository, 10)
    launch(tiny_repository, "--name", "nice").ready()
    own = os.getpriority(os.PRIO_PROCESS, 0)
    found: dict[bool, list[int]] = {True: [], False: []}
    for pid in processes_of(state_of("nice").instance_id):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"triton_python_backend_stub" in command.split(b"\0")[0]:
            found[b"tile_preprocess" in command].append(os.getpriority(os.PRIO_PROCESS, pid))
    assert found[True] == [min(19, own + 10)] * 2
    assert found[False] == [own] * len(found[False]) != []


@pytest.mark.parametrize("niceness", [-5, 20])
def test_a_niceness_that_is_none_keeps_it_from_loading(
    niceness: int, tiny_repository: Path, launch: Launch
) -> None:
    add_preprocess(tiny_repository, niceness)
    launched = launch(tiny_repository, "--name", "not_nice")
    assert launched.process.wait(90) == 1
    assert f"niceness must be 0 to 19, not {niceness}" in launched.errors()
