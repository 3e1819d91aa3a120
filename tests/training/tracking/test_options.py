import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.errors import TrackingError, TrackingOptionsError
from training.tracking import TrackingOptions, add_arguments, options, read_options

ROOT = Path(__file__).resolve().parents[3]


def parsed(*words: str) -> TrackingOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_options(parser.parse_args(words))


def test_the_default_is_mlflow_in_a_database_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parsed() == TrackingOptions(trackers=("mlflow",), uri=f"sqlite:///{tmp_path}/runs/mlflow.db")


def test_the_environment_names_the_store_and_the_flag_wins(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000/")
    assert parsed().uri == "http://tracker:5000"
    assert not parsed().uri_told
    told = parsed("--tracking-uri", "https://other/mlflow")
    assert (told.uri, told.uri_told) == ("https://other/mlflow", True)


@pytest.mark.parametrize(
    ("told", "trackers"),
    [
        ("none", ()),
        ("mlflow", ("mlflow",)),
        ("tensorboard, mlflow", ("mlflow", "tensorboard")),
        ("tensorboard", ("tensorboard",)),
    ],
)
def test_trackers_are_chosen(told, trackers):
    assert parsed("--track", told).trackers == trackers


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("runs/mlruns", "plain folders"),
        ("file:///tmp/mlruns", "plain folders"),
        ("sqlite://mlflow.db", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///a?b.db", "told apart"),
        ("http://", "names no host"),
        ("http:/tracker", "names no host"),
        ("http://tracker:port", "is no URL"),
        ("http://my tracker:5000", "names no host"),
        ("http://me:secret@tracker:5000", "MLFLOW_TRACKING_USERNAME"),
        ("redis://tracker", "no store of scheme 'redis'"),
        ("", "plain folders"),
    ],
)
def test_a_uri_that_mlflow_cannot_use_is_refused_at_once(uri, reason):
    with pytest.raises(TrackingOptionsError, match=reason) as caught:
        parsed("--track", "mlflow", "--tracking-uri", uri)
    assert "secret" not in str(caught.value)
    assert isinstance(caught.value, ValueError)  # exit code 2


@pytest.mark.parametrize(
    "words",
    [
        ("--track", "wandb"),
        ("--track", "none,mlflow"),
        ("--track", ""),
        ("--track", "none", "--register", "clotline"),
        ("--track", "tensorboard", "--tracking-uri", "http://tracker"),
        ("--register", "a/b"),
        ("--register", "champion@clotline"),
        ("--register", " "),
        ("--experiment", ""),
    ],
)
def test_what_cannot_be_meant_is_refused(words):
    with pytest.raises(TrackingOptionsError):
        parsed(*words)


@pytest.mark.parametrize("alias", ["", "latest", "v3", "a b", "Ü"])
def test_aliases_that_the_registry_refuses(alias):
    with pytest.raises(TrackingOptionsError, match="alias"):
        options.check_alias(alias)


def test_parents_of_the_database_are_made(tmp_path):
    options.prepare_store(f"sqlite:///{tmp_path}/a b/c/mlflow.db")
    assert (tmp_path / "a b" / "c").is_dir()


def test_a_store_that_cannot_be_one_is_an_error_at_start(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for path, reason in (
        ("file/mlflow.db", "cannot be used"),
        ("file", "no SQLite database"),
        ("", "is a folder"),
    ):
        with pytest.raises(TrackingError, match=reason):
            options.prepare_store(f"sqlite:///{tmp_path}/{path}")


def test_a_password_is_never_shown():
    assert options.redacted("postgresql://me:se@cret@host/db") == "postgresql://me:***@host/db"
    assert options.redacted("sqlite:////a:b@c/d.db") == "sqlite:////a:b@c/d.db"
    assert (
        options.redacted("--tracking-uri=postgresql://me:x@h/d") == "--tracking-uri=postgresql://me:***@h/d"
    )


def test_without_tracking_nothing_is_imported(tmp_path):
    code = (
        "import sys; from training import tracking\n"
        f"run = tracking.start(tracking.TrackingOptions(), recipe={{}}, run_dir={str(tmp_path / 'run')!r}, run_name='x')\n"
        "run.log({'a': 1}, step=0); assert run.finish(metrics={'b': 1}) == {} and not run.trackers\n"
        "print([name for name in ('mlflow', 'torch', 'accelerate', 'tensorboard') if name in sys.modules])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "[]"
    assert not (tmp_path / "run").exists()
