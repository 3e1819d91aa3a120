"""Servers follow an alias of a real MLflow store, and what does not follow is reported."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.releases.errors import SourceUnavailable
from serving.releases.following import Follower, fetch
from serving.releases.live import Live
from tests.conftest import run_module

pytest.importorskip("mlflow", reason="the registry is an extra")
URI = "models:/clotline@champion"
NAME = f"followed-{os.getpid()}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module")
def live(tiny_releases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The live directory of server NAME, which serves `a`."""
    directory = tmp_path_factory.mktemp("followed server") / "live"
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--detach"]
    done = run_module(
        "serving", "up", "--live", directory, "--release", tiny_releases["a"], "--name", NAME, *ports
    )
    assert done.returncode == 0, done.stderr
    yield Live(directory)
    run_module("serving", "down", "--name", NAME)


def exporters(*arguments: str | Path) -> dict[str, Any]:
    done = run_module("exporters", *arguments)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def states(report: dict[str, Any]) -> list[str]:
    return [row["state"] for row in report["servers"]]


def test_a_server_follows_the_alias(
    store: str, live: Live, tiny_releases: dict[str, Path], tmp_path: Path
) -> None:
    tracking = ["--tracking-uri", store]
    exporters("register", tiny_releases["c"], "--name", "clotline", *tracking)
    exporters("alias", "clotline", "1", "champion", *tracking)
    follow = ["serving", "follow", URI, "--once", "--releases", tmp_path / "releases", *tracking]

    moved = run_module(*follow, "--name", NAME, "--name", "nobody")
    report = json.loads(moved.stdout)
    assert states(report) == ["moved", "down"]
    assert (moved.returncode, report["drifting"], report["model_version"]) == (1, ["nobody"], "1")
    assert [row["serving"] for row in report["servers"]] == [report["release_id"], None]

    fetched = {
        "release": str(tmp_path / "releases" / report["release_id"]),
        "release_id": report["release_id"],
    }
    follower = Follower(URI, [NAME], 60, 10)
    assert states(follower.look(fetched, move=True)) == ["in step"]
    assert run_module("serving", "rollback", "--name", NAME).returncode == 0
    for again in (follower, Follower(URI, [NAME], 60, 10)):
        assert states(again.look(fetched, move=True)) == ["rolled back"]
    assert run_module("serving", "rollback", "--name", NAME).returncode == 0

    damaged = shutil.copytree(tiny_releases["b"], tmp_path / "damaged")
    (damaged / "golden" / "0000.jpg").unlink()
    values = json.loads((damaged / "release.json").read_text())
    refused = {"release": str(damaged), "release_id": values["release_id"]}
    for _ in range(2):  # the second time the journal knows
        row = follower.look(refused, move=True)["servers"][0]
        assert (row["state"], "0000.jpg is missing" in row["error"]) == ("refused", True)
    assert (live.directory / "journal.jsonl").read_text().count('"outcome":"refused"') == 1

    a = json.loads((tiny_releases["a"] / "release.json").read_text())["release_id"]
    home = {"release": str(tiny_releases["a"]), "release_id": a}
    assert states(follower.look(home, move=False)) == ["behind"]
    with live.hold("anna@here"):
        assert states(follower.look(home, move=True)) == ["busy"]
    assert states(follower.look(home, move=True)) == ["moved"]


def test_an_alias_that_nobody_set_moves_nothing(store: str, tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match="nobody"):
        fetch("models:/clotline@nobody", tmp_path / "releases", store)
    assert not (tmp_path / "releases").exists() or list((tmp_path / "releases").iterdir()) == []
