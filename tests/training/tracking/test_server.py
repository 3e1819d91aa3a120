"""Servers that are there, die, come back, hang, or refuse."""

import http.server
import socket
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from tests.mlflow_server import MLflowServer, free_port
from tests.training.tracking.conftest import history_of, runs_in
from training import tracking
from training.tracking import TrackingOptions, identity, sender, store

ROOT = Path(__file__).resolve().parents[3]


def test_a_server_that_dies_and_comes_back_has_all_of_the_run(
    database, tmp_path, checkpoint_dir, monkeypatch, capfd
):
    port = free_port()
    server = MLflowServer(database, port)
    try:
        server.wait_until_ready()
        with urllib.request.urlopen(server.uri, timeout=5) as page:
            assert b"<title>MLflow</title>" in page.read()
        options = TrackingOptions(trackers=("mlflow",), uri=server.uri, register="clotline")
        run = tracking.start(options, recipe={"seed": 1}, run_dir=tmp_path / "run", run_name="lost")
        run.log({"train_loss": 1.0}, step=0)
        deadline_s = time.monotonic() + 30
        while run.mlflow_run_id is None:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        server.kill()
        run.log({"train_loss": 0.5}, step=1)
        told = run.finish(metrics={"accuracy": 1.0}, checkpoint=checkpoint_dir)
        assert told["unsent_records"] > 0
        assert "python -m training sync" in capfd.readouterr().err

        server = MLflowServer(database, port)
        server.wait_until_ready()
        synced = _send(run.directory, server.uri)
        assert synced.mlflow_run_id == told["mlflow_run_id"]
        assert synced.model_version == "1"
        (run.directory / identity.SENT_NAME).unlink()
        assert _send(run.directory, server.uri).mlflow_run_id == told["mlflow_run_id"]

        client = store.connect(server.uri)
        (stored,) = runs_in(client)
        assert stored.info.status == "FINISHED"
        assert history_of(client, stored.info.run_id, "train_loss") == [(0, 1.0), (1, 0.5)]
        assert history_of(client, stored.info.run_id, "accuracy") == [(2, 1.0)]
        assert len(client.search_model_versions("name = 'clotline'")) == 1
        assert (tmp_path / "run" / "tracking").is_dir()
        files = {path.name for path in (database.parent / "served artifacts").rglob("*")}
        assert {"recipe.json", "model.safetensors"} <= files
    finally:
        server.kill()


def _send(directory, uri):
    one = sender.Sender(directory, uri, warn=print)
    try:
        one.send()
    finally:
        one.close()
    return one.sent


def test_a_server_that_accepts_and_never_answers(journal_of, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        uri = f"http://127.0.0.1:{listening.getsockname()[1]}"
        directory = journal_of(to=uri, end=None)
        started_s = time.monotonic()
        with pytest.raises(store.StoreLostError, match="does not answer"):
            _send(directory, uri)
        assert time.monotonic() - started_s < 30  # MLflow's own defaults take minutes


class RefusingServer(http.server.BaseHTTPRequestHandler):
    """Stands for a server whose login refuses us: 401 to everything."""

    def answer(self) -> None:
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_: object) -> None:
        pass


def test_wrong_credentials_are_named(journal_of):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), RefusingServer) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{refusing.server_port}"
        directory = journal_of(to=uri, end=None)
        with pytest.raises(store.StoreLostError, match="refuses these credentials"):
            _send(directory, uri)
        assert "credentials" in identity.read_sent(directory, uri).trouble
        refusing.shutdown()
