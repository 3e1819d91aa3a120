"""A training process with its sender, both real, on a SQLite store."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.tracking.conftest import history_of, runs_in
from training import tracking
from training.errors import TrackingError
from training.tracking import TrackingOptions, identity, sync

ROOT = Path(__file__).resolve().parents[3]

TRAINING = """
import sys, time
from training import tracking
uri, run_dir = sys.argv[1:]
run = tracking.start(tracking.TrackingOptions(trackers=("mlflow",), uri=uri), recipe={"seed": 1},
                     run_dir=run_dir, run_name="killed", resume=True)
for step in range(8):
    run.log({"train_loss": 1 / (step + 1)}, step=step)
print("logged", flush=True)
time.sleep(60)
"""


def synced(run_dir, *words):
    parser = argparse.ArgumentParser()
    sync.add_arguments(parser)
    return sync.run(parser.parse_args([str(run_dir), *words]))


def test_killed_and_resumed_training_is_one_run_without_gap_or_duplicate(uri, client, tmp_path):
    run_dir = tmp_path / "run"
    first = subprocess.Popen(
        [sys.executable, "-c", TRAINING, uri, str(run_dir)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "logged\n"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    _until(lambda: [run.info.status for run in runs_in(client)] == ["KILLED"])
    options = TrackingOptions(trackers=("mlflow",), uri=uri)
    second = tracking.start(options, recipe={"seed": 1}, run_dir=run_dir, run_name="killed", resume=True)
    for step in range(5, 12):  # from the last saved state on
        second.log({"train_loss": 1 / (step + 1)}, step=step)
    assert second.finish(metrics={"accuracy": 1.0})["unsent_records"] == 0
    (run,) = runs_in(client)
    assert run.info.status == "FINISHED"
    assert [step for step, _ in history_of(client, run.info.run_id, "train_loss")] == list(range(12))
    assert run.data.metrics["accuracy"] == 1.0
    assert run.data.tags["clotline.run_id"] == identity.read(identity.runs_of(run_dir)[0]).run_id


def test_sync_closes_the_gap_that_kill_9_left(journal_of, uri, client):
    directory = journal_of(end=None, register="clotline")
    answer = synced(directory.parent.parent)
    assert answer["exit_code"] == 0
    assert answer["unsent_records"] == 0
    assert answer["runs"][0]["sent_records"] == 5
    assert [run.info.status for run in runs_in(client)] == ["KILLED"]
    assert synced(directory.parent.parent)["runs"][0]["sent_records"] == 0
    assert len(runs_in(client)) == 1


def _until(holds, seconds=30):
    deadline_s = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_server_that_is_down_costs_the_end_of_training_a_bounded_time(tmp_path, capfd):
    options = TrackingOptions(trackers=("mlflow",), uri="http://127.0.0.1:9")
    run = tracking.start(options, recipe={}, run_dir=tmp_path / "my run", run_name="alone")
    run.log({"train_loss": 1.0}, step=0)
    told = run.finish(metrics={"accuracy": 1.0})
    assert told["unsent_records"] >= 4
    assert told["mlflow_run_id"] is None
    assert json.dumps(told)
    warning = capfd.readouterr().err
    assert f"python -m training sync '{tmp_path}/my run'" in warning
    assert "127.0.0.1:9 cannot be reached" in warning


def test_only_the_first_process_tracks(tmp_path, monkeypatch, uri):
    monkeypatch.setenv("RANK", "1")
    run = tracking.start(
        TrackingOptions(trackers=("mlflow",), uri=uri), recipe={}, run_dir=tmp_path / "run", run_name="x"
    )
    assert run.trackers == []
    assert run.finish() == {}
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_an_error_at_start(tmp_path, uri):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="journal"):
        tracking.start(
            TrackingOptions(trackers=("mlflow",), uri=uri), recipe={}, run_dir=tmp_path / "file", run_name="x"
        )


def test_sync_says_what_is_wrong(journal_of, tmp_path):
    with pytest.raises(TrackingError, match="no run was tracked"):
        synced(tmp_path)
    directory = journal_of(to="http://127.0.0.1:9", end=None)
    answer = synced(directory.parent.parent)
    assert answer["exit_code"] == 1
    assert answer["unsent_records"] == 5
    (directory / identity.IDENTITY_NAME).write_text("{}")
    with pytest.raises(TrackingError, match=r"run\.json is not of format"):
        synced(directory.parent.parent)


def test_a_password_is_kept_nowhere_and_asked_for_again(journal_of, tmp_path):
    directory = journal_of(to="postgresql://me:hidden@127.0.0.1:9/db", end=None)
    assert not [path for path in directory.rglob("*") if path.is_file() and b"hidden" in path.read_bytes()]
    os.environ["MLFLOW_TRACKING_URI"] = "http://other"
    with pytest.raises(TrackingError, match="password of postgresql://me:"):
        synced(directory.parent.parent)
