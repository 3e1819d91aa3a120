import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from training.tracking.journal import Journal, metric_name, read

ROOT = Path(__file__).resolve().parents[3]


def records(path):
    return [record for record, _ in read(path)]


def test_numbers_of_all_kinds_come_back(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.metrics(
        {"a": 1, "b": np.float32(0.5), "c": torch.tensor(2.0), "d": float("nan"), "e": "text"}, step=4
    )
    journal.metrics({"a": float("-inf")}, step=5)
    first, second = records(tmp_path / "journal.jsonl")
    assert first["step"] == 4
    assert first["values"] == {"a": 1.0, "b": 0.5, "c": 2.0, "d": "nan"}
    assert float(second["values"]["a"]) == float("-inf")
    assert journal.last_step == 5


def test_every_line_is_strict_json(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("data", data={"path": tmp_path, ("a", 1): {2}, "share": float("nan"), "text": "\n"})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (line,) = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["data"]["path"] == str(tmp_path)


def test_a_resumed_run_leaves_out_the_steps_that_it_repeats(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    assert journal.is_new
    for step in range(5):
        journal.metrics({"train_loss": step}, step=step)
    journal.metrics({"accuracy": 0.5}, step=2)
    journal.close()

    resumed = Journal(path)
    assert not resumed.is_new
    for step in range(3, 7):
        resumed.metrics({"train_loss": step, "accuracy": 0.6}, step=step)
    steps = [(name, r["step"]) for r in records(path) for name in r["values"]]
    assert [step for name, step in steps if name == "train_loss"] == list(range(7))
    assert [step for name, step in steps if name == "accuracy"] == [2, 3, 4, 5, 6]


def test_a_torn_tail_loses_only_itself(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path).metrics({"a": 1}, step=0)
    with path.open("ab") as stream:
        stream.write(b'{"kind":"metrics","time_ms":1,"st')  # no end of line: the machine lost its power
    assert [r["step"] for r in records(path)] == [0]
    Journal(path).metrics({"a": 1}, step=1)
    assert [r["step"] for r in records(path)] == [0, 1]


def test_offsets_lead_to_the_next_record(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for step in range(3):
        journal.metrics({"a": 1}, step=step)
    (_, behind_first), *_ = read(path)
    assert [record["step"] for record, _ in read(path, behind_first)] == [1, 2]
    assert list(read(path, path.stat().st_size)) == []
    assert list(read(tmp_path / "none.jsonl")) == []


def test_a_full_disk_warns_once_counts_and_goes_on_when_there_is_room(tmp_path):
    path = tmp_path / "journal.jsonl"
    code = (
        "import resource, signal, sys; from pathlib import Path; from training.tracking.journal import Journal\n"
        f"journal = Journal(Path({str(path)!r}))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, -1))  # the write that crosses it stops in the middle\n"
        "for step in range(5): journal.metrics({'a': step}, step=step)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))\n"
        "journal.metrics({'a': 5}, step=5)\n"
        "print(journal.lost_records)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    steps = [record["step"] for record in records(path)]
    assert 0 < len(steps) < 6
    assert steps[-1] == 5
    assert int(told.stdout) == 6 - len(steps)
    assert told.stderr.count("warning") == 1


def test_kill_9_loses_nothing_that_was_logged(tmp_path):
    path = tmp_path / "journal.jsonl"
    code = (
        "import os, signal, sys; from pathlib import Path; from training.tracking.journal import Journal\n"
        f"journal = Journal(Path({str(path)!r}))\n"
        "for step in range(500): journal.metrics({'a': step}, step=step)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [record["step"] for record in records(path)] == list(range(500))


@pytest.mark.parametrize(
    ("told", "taken"),
    [
        ("train_loss", "train_loss"),
        ("AUC (by patient)", "AUC _by patient_"),
        ("/a//../b/", "a/b"),
        ("é" * 300, "_" * 250),
        ("", "_"),
    ],
)
def test_names_are_made_such_that_mlflow_takes_them(told, taken):
    from mlflow.utils.validation import _validate_metric_name

    assert metric_name(told) == taken
    _validate_metric_name(metric_name(told))
