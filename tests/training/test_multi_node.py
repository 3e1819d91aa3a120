"""docs/multi_node.md and its configuration files: two "machines" on the loopback interface."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATIONS = ROOT / "docs" / "multi_node"
TRAIN = ROOT / "training" / "train.py"
FSDP_ON_CPU = Path(__file__).with_name("fsdp_on_cpu.py")


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp", "FSDP")])
def test_configurations_are_accelerates(name: str, kind: str) -> None:
    loaded = load_config_from_file(str(CONFIGURATIONS / f"{name}.yaml"))
    assert loaded.distributed_type == kind
    assert (loaded.num_machines, loaded.num_processes, loaded.rdzv_backend) == (2, 16, "static")
    assert loaded.mixed_precision == "no"
    if kind == "FSDP":
        assert loaded.fsdp_config["fsdp_version"] == 2


def test_the_page_names_files_that_exist() -> None:
    page = (ROOT / "docs" / "multi_node.md").read_text()
    named = set(re.findall(r"\w+/[\w/]+\.(?:yaml|py)\b", page))
    assert {"docs/multi_node/ddp.yaml", "docs/multi_node/fsdp.yaml", "training/train.py"} <= named
    assert all((ROOT / name).exists() for name in named)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def on_two_machines(name: str, script: Path, recipe_file: Path, data: Path, out: Path) -> list[str]:
    """Train with one process a "machine"; standard output of both, after they ended well."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(CONFIGURATIONS / f"{name}.yaml"), "--num_processes", "2"]
    launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    arguments = ["--recipe", str(recipe_file), "--data", str(data), "--out", str(out), "--track", "none"]
    arguments += ["--set", "epochs=1", "--set", "batch_size=4", "--set", "gradient_accumulation_steps=2"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    machines = [
        subprocess.Popen(
            [*launch, "--machine_rank", str(rank), str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "OMP_WAIT_POLICY": "passive"},
        )
        for rank in (0, 1)
    ]
    try:
        answers = [machine.communicate(timeout=120) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], "".join(err for _, err in answers)
    return [out for out, _ in answers]


def test_ddp_and_fsdp_train_the_same_weights(recipe_file: Path, tile_dir: Path, tmp_path: Path) -> None:
    weights = []
    for name, script in (("ddp", TRAIN), ("fsdp", FSDP_ON_CPU)):
        first, second = on_two_machines(name, script, recipe_file, tile_dir, tmp_path / name)
        assert json.loads(first.splitlines()[-1])["checkpoint"] == str(tmp_path / name / "checkpoint")
        assert second.strip() == "", "the report is printed once"
        weights.append(safetensors.torch.load_file(tmp_path / name / "checkpoint" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=2e-6)
