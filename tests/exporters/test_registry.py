"""Checkpoints out of MLflow's registry, and releases into it: a real SQLite store, and a real server."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from exporters.__main__ import main
from exporters.errors import ReleaseError, ReleaseExistsError
from exporters.registry.origin import checkpoint_at
from exporters.registry.releases import fetch_release, register_release
from exporters.release import export_release
from exporters.release_manifest import checksum
from exporters.release_manifest import load as load_manifest
from exporters.verify import verify
from tests.mlflow_server import MLflowServer, free_port
from training import checkpoint
from training.errors import TrackingError, TrackingOptionsError
from training.tracking import identity, journal, registry, store
from training.tracking.model import log_checkpoint

pytest.importorskip("mlflow", reason="an extra of the exporters")
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `store.configure` sets for its process does not outlive a test."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="module")
def filled(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store whose model clotline has one version, a checkpoint; copied for every test."""
    before = dict(os.environ)
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = store.connect(uri)
    client.search_experiments()
    shutil.copy(folder / "mlflow.db", folder / "empty.db")
    run, _ = store.StoredRun.find_or_create(
        client, run_id="r" * 32, name="small", experiment="tests", uri=uri, time_ms=0, known=None
    )
    log_checkpoint(run, checkpoint_dir, {"time_ms": 0}, register="clotline", scratch=folder)
    os.environ.clear()
    os.environ.update(before)
    return folder


@pytest.fixture
def uri(filled: Path) -> str:
    """The store of all tests here; each uses a model name of its own for what it registers."""
    return f"sqlite:///{filled}/mlflow.db"


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A model name of the test's own."""
    return "".join(c if c.isalnum() else "-" for c in request.node.name)[:200]


@pytest.fixture(scope="module")
def from_registry(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of models:/clotline@challenger."""
    before = dict(os.environ)
    directory = tmp_path_factory.mktemp("exported") / "release"
    with checkpoint_at("models:/clotline@challenger", tracking_uri=f"sqlite:///{filled}/mlflow.db") as found:
        export_release(found.directory, directory, ["onnx"], served=False, mlflow=found.mlflow)
    os.environ.clear()
    os.environ.update(before)
    return directory


def with_origin(release: Path, folder: Path, origin: dict[str, Any] | None) -> Path:
    """A copy of a release that says that it comes from elsewhere."""
    copy = shutil.copytree(release, folder / "release")
    values = json.loads((copy / "release.json").read_text())
    del values["sha256"]
    values["mlflow"] = origin
    (copy / "release.json").write_text(json.dumps({**values, "sha256": checksum(values)}))
    return copy


def version_of(uri: str, name: str, number: str) -> Any:
    return store.connect(uri).get_model_version(name, number)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_checkpoint_comes_out_of_the_registry_and_leaves_nothing_behind(
    uri: str, checkpoint_dir: Path
) -> None:
    with checkpoint_at("models:/clotline@challenger", tracking_uri=uri) as found:
        assert checkpoint.load(found.directory).manifest == checkpoint.load(checkpoint_dir).manifest
        assert found.mlflow == {
            "run_id": version_of(uri, "clotline", "1").run_id,
            "model_name": "clotline",
            "model_version": "1",
            "alias": "challenger",
            "tracking_uri": uri,
        }
    assert not found.directory.exists()


def test_a_directory_is_taken_as_it_is(checkpoint_dir: Path) -> None:
    with checkpoint_at(checkpoint_dir) as found:
        assert (found.directory, found.mlflow) == (checkpoint_dir, None)


def test_a_directory_of_a_tracked_run_says_which_run(checkpoint_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint_dir, tmp_path / "checkpoint")
    manifest = json.loads((tmp_path / "checkpoint/checkpoint.json").read_text())
    (tmp_path / "checkpoint/checkpoint.json").write_text(
        json.dumps({**manifest, "created_utc": "2026-01-02T03:04:05+00:00"})
    )
    directory = tmp_path / "tracking/one"
    directory.mkdir(parents=True)
    who = identity.Identity(
        run_id="r", run_name="x", uri="postgresql://me:***@db/mlflow", experiment="e", register="clotline",
        created_utc="2026-01-02T03:00:00.000+00:00",
    )  # fmt: skip
    identity.write(directory, who)
    identity.write_sent(directory, identity.Sent(uri=who.uri, mlflow_run_id="abc", model_version="4"))
    record = {"kind": "model", "checkpoint": "checkpoint", "time_ms": 1767323046000}  # 03:04:06
    (directory / journal.JOURNAL_NAME).write_text(json.dumps(record) + "\n")
    with checkpoint_at(tmp_path / "checkpoint") as found:
        assert found.mlflow == {
            "run_id": "abc",
            "model_name": "clotline",
            "model_version": "4",
            "alias": None,
            "tracking_uri": "postgresql://me:***@db/mlflow",
        }
    # One that was written after the run had recorded its model is another one.
    (tmp_path / "checkpoint/checkpoint.json").write_text(
        json.dumps({**manifest, "created_utc": "2026-01-02T03:05:00+00:00"})
    )
    with checkpoint_at(tmp_path / "checkpoint") as found:
        assert found.mlflow is None


def test_a_release_is_one_version_however_often_it_is_registered(
    uri: str, name: str, from_registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["register", str(from_registry), "--name", name, "--tracking-uri", uri]) == 0
    first = last_line(capsys)
    manifest = load_manifest(from_registry)
    checkpoint_version = version_of(uri, "clotline", "1")
    assert first == {
        "model_name": name,
        "model_version": "1",
        "release_id": manifest.release_id,
        "run_id": checkpoint_version.run_id,
        "artifacts": "release",
        "tracking_uri": uri,
        "created": True,
    }
    again = register_release(from_registry, name, tracking_uri=uri)
    assert again == {**first, "created": False}
    tags = version_of(uri, name, "1").tags
    assert tags["clotline.release_id"] == manifest.release_id
    assert (
        tags["clotline.manifest_sha256"] == json.loads((from_registry / "release.json").read_text())["sha256"]
    )
    assert tags["clotline.formats"] == "onnx"
    assert tags["clotline.onnx.status"] == "accepted"
    assert float(tags["clotline.onnx.max_abs_diff"]) <= 1e-4
    assert json.loads(tags["clotline.metrics"]) == {"tile_accuracy": 0.5}
    assert tags["clotline.exported_from"] == "models:/clotline/1"


def test_a_registered_release_comes_back_whole(
    uri: str, name: str, from_registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_release(from_registry, name, tracking_uri=uri)
    assert main(["alias", name, "1", "champion", "--tracking-uri", uri]) == 0
    assert last_line(capsys)["from_version"] is None
    asked = ["fetch-release", f"models:/{name}@champion", "--tracking-uri", uri]
    assert main([*asked, "--out", str(tmp_path / "a b" / "release")]) == 0
    told = last_line(capsys)
    assert (told["alias"], told["model_version"], told["changed"]) == ("champion", "1", True)
    assert verify(tmp_path / "a b" / "release") == verify(from_registry)
    assert [path.name for path in (tmp_path / "a b").iterdir()] == ["release"]
    assert main([*asked, "--out", str(tmp_path / "a b" / "release")]) == 2
    for changed in (True, False):
        assert main([*asked, "--releases", str(tmp_path / "all")]) == 0
        told = last_line(capsys)
        assert told["changed"] is changed
        assert Path(told["release"]) == tmp_path / "all" / told["release_id"]


def test_moves_of_an_alias_are_recorded(uri: str, name: str, from_registry: Path) -> None:
    register_release(from_registry, name, tracking_uri=uri)
    assert main(["alias", name, "1", "champion", "--tracking-uri", uri]) == 0
    model = store.connect(uri).get_registered_model(name)
    moves = [json.loads(value) for key, value in model.tags.items() if "clotline.alias.champion" in key]
    assert [(move["from_version"], move["version"]) for move in moves] == [(None, "1")]


def test_a_manifest_alone_can_be_registered_and_not_be_fetched(
    uri: str, name: str, from_registry: Path, tmp_path: Path
) -> None:
    told = register_release(from_registry, name, tracking_uri=uri, whole=False)
    assert told["artifacts"] == "manifest"
    with pytest.raises(TrackingError, match="does not hold the release"):
        fetch_release(f"models:/{name}/1", directory=tmp_path / "x", tracking_uri=uri)
    assert not any(tmp_path.iterdir())


def test_a_release_of_no_known_run_has_none(uri: str, name: str, from_registry: Path, tmp_path: Path) -> None:
    release = with_origin(from_registry, tmp_path, None)
    assert register_release(release, name, tracking_uri=uri)["run_id"] is None


def test_an_upload_that_broke_off_is_done_again(
    uri: str, name: str, from_registry: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    (tmp_path / "other").mkdir()
    release = with_origin(from_registry, tmp_path / "other", None)
    client = store.connect(uri)
    for model in client.search_logged_models([store.experiment_id_of(client, "clotline", uri)]):
        client.delete_logged_model(model.model_id)  # what other tests uploaded of it
    with monkeypatch.context() as broken:
        broken.setattr(
            MlflowClient, "finalize_logged_model", lambda *_: (_ for _ in ()).throw(OSError("cut off"))
        )
        with pytest.raises(TrackingError, match="cut off"):
            register_release(release, name, tracking_uri=uri)
    with pytest.raises(TrackingError, match="not in the registry"):
        fetch_release(f"models:/{name}/1", directory=tmp_path / "x", tracking_uri=uri)
    assert register_release(release, name, tracking_uri=uri)["model_version"] == "1"
    assert fetch_release(f"models:/{name}/1", directory=tmp_path / "x", tracking_uri=uri)["changed"]


def test_a_damaged_release_is_not_registered(
    uri: str, name: str, from_registry: Path, tmp_path: Path
) -> None:
    shutil.copytree(from_registry, tmp_path / "release")
    (tmp_path / "release/MODEL_CARD.md").write_text("better than it was")
    with pytest.raises(ReleaseError, match=r"MODEL_CARD\.md"):
        register_release(tmp_path / "release", name, tracking_uri=uri)
    assert not store.connect(uri).search_registered_models(f"name = '{name}'")


def test_what_was_damaged_on_the_way_is_not_handed_out(
    uri: str, name: str, from_registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_release(from_registry, name, tracking_uri=uri)
    fetch = registry.fetch_folder

    def cut(*arguments: Any) -> Path:
        directory = fetch(*arguments)
        (directory / "models/tile_network_onnx/1/model.onnx").write_bytes(b"half of it")
        return directory

    monkeypatch.setattr(registry, "fetch_folder", cut)
    with pytest.raises(ReleaseError, match=r"model\.onnx"):
        fetch_release(f"models:/{name}/1", directory=tmp_path / "x", tracking_uri=uri)
    assert not any(tmp_path.iterdir())


def test_an_origin_that_is_gone_is_said_and_can_be_left_out(
    uri: str, name: str, from_registry: Path, tmp_path: Path
) -> None:
    origin = {"run_id": "0" * 32, "model_name": "clotline", "model_version": "9", "tracking_uri": uri}
    release = with_origin(from_registry, tmp_path, origin)
    with pytest.raises(TrackingError, match=r"models:/clotline/9, is no longer in .*--no-link"):
        register_release(release, name, tracking_uri=uri)
    assert register_release(release, name, tracking_uri=uri, link=False)["run_id"] is None


def test_a_version_deleted_meanwhile_is_said(
    uri: str, name: str, from_registry: Path, tmp_path: Path
) -> None:
    register_release(from_registry, name, tracking_uri=uri)
    found = registry.find_version(f"models:/{name}/1", uri=uri)
    store.connect(uri).delete_model_version(name, "1")
    with pytest.raises(TrackingError, match="not in the registry"):
        registry.fetch_folder(found, "release", "release.json", tmp_path / "x")
    assert not any(tmp_path.iterdir())


def test_a_release_is_no_checkpoint_and_says_where_one_is(uri: str, name: str, from_registry: Path) -> None:
    register_release(from_registry, name, tracking_uri=uri)
    with (
        pytest.raises(TrackingError, match=r"is the release .* name the version .*models:/clotline/1"),
        checkpoint_at(f"models:/{name}/1", tracking_uri=uri),
    ):
        pass


def test_a_model_without_a_checkpoint_is_said(uri: str, name: str) -> None:
    client = store.connect(uri)
    model = client.create_logged_model(store.experiment_id_of(client, "tests", uri), name="other")
    client.create_registered_model(name)
    client.create_model_version(name, f"models:/{model.model_id}", model_id=model.model_id)
    with (
        pytest.raises(TrackingError, match=r"holds no checkpoint\.json"),
        checkpoint_at(f"models:/{name}/1", tracking_uri=uri),
    ):
        pass


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("export", "models:/clotline@nobody"), 1, "no alias 'nobody'; it has challenger (version 1)"),
        (("export", "models:/clotline/7"), 1, "not in the registry"),
        (("export", "models:/unknown/1"), 1, "not in the registry"),
        (("export", "models:/clotline"), 2, "names no model"),
        (("fetch-release", "models:/clotline/1"), 1, "is no release"),
        (("fetch-release", "models:/clotline@nobody"), 1, "no alias 'nobody'"),
        (("alias", "clotline", "1", "latest"), 2, "cannot take the alias"),
        (("alias", "clotline", "7", "champion"), 1, "not in the registry"),
    ],
)
def test_what_the_registry_does_not_have_is_one_line(
    words: tuple[str, ...], code: int, said: str, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = {"export": ["--release", str(tmp_path / "x")], "fetch-release": ["--out", str(tmp_path / "x")]}
    assert main([*words, *out.get(words[0], []), "--tracking-uri", uri]) == code
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")
    assert said in error[-1]
    assert not any(tmp_path.iterdir())


def test_a_registry_that_cannot_be_reached_is_said(from_registry: Path, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="cannot be reached"):
        register_release(from_registry, "clotline", tracking_uri=NOWHERE)
    with (
        pytest.raises(TrackingError, match="cannot be reached"),
        checkpoint_at("models:/clotline/1", tracking_uri=NOWHERE),
    ):
        pass
    with pytest.raises(TrackingOptionsError, match="model name"):
        register_release(from_registry, "a/b", tracking_uri=NOWHERE)
    (tmp_path / "x").mkdir()
    with pytest.raises(ReleaseExistsError):
        fetch_release("models:/clotline/1", directory=tmp_path / "x", tracking_uri=NOWHERE)


def test_a_release_goes_through_a_real_server(
    filled: Path, from_registry: Path, tmp_path: Path, snapshot: Callable[[Path], dict[str, str]]
) -> None:
    shutil.copy(filled / "empty.db", tmp_path / "mlflow.db")
    server = MLflowServer(tmp_path / "mlflow.db", free_port())
    try:
        server.wait_until_ready()
        told = register_release(from_registry, "served", tracking_uri=server.uri)
        assert told["created"]
        assert not register_release(from_registry, "served", tracking_uri=server.uri)["created"]
        fetched = fetch_release("models:/served/1", directory=tmp_path / "release", tracking_uri=server.uri)
        assert fetched["release_id"] == told["release_id"]
        with pytest.raises(TrackingError, match="holds no"):
            registry.fetch_folder(
                registry.find_version("models:/served/1", uri=server.uri), "nothing", "x", tmp_path / "y"
            )
    finally:
        server.kill()
    assert list(
        (tmp_path / "served artifacts").rglob("model.onnx")
    )  # the server has them, and not this process's disk
    before, after = snapshot(from_registry), snapshot(tmp_path / "release")
    assert before == after
