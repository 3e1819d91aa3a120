import json
import math
import shutil

import pytest

from tests.training.tracking.conftest import history_of, runs_in
from training.tracking import identity, sender, store
from training.tracking.journal import JOURNAL_NAME, Journal


def send(directory, uri, warnings=None):
    one = sender.Sender(directory, uri, warn=(warnings if warnings is not None else []).append)
    try:
        one.send()
    finally:
        one.close()
    return one.sent


def test_a_run_arrives_whole(journal_of, uri, client, database):
    sent = send(journal_of(), uri)
    (run,) = runs_in(client)
    assert (run.info.run_name, run.info.status) == ("small", "FINISHED")
    assert run.data.params == {"seed": "3", "spec.class_names": '["CE", "LAA"]'}
    assert run.data.metrics["slide_roc_auc"] == 0.75
    assert history_of(client, run.info.run_id, "train_loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert run.data.tags["mlflow.source.name"] == "train.py --recipe small"
    assert run.data.tags["mlflow.source.git.commit"]
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("clots", "f" * 36)
    assert json.loads(dataset.dataset.profile)["fingerprint"] == "f" * 64
    assert sent.mlflow_run_id == run.info.run_id

    artifacts = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert artifacts == {
        "recipe.json",
        "environment.json",
        "data.json",
        "held_out.csv",
        "history.json",
        "plots",
    }
    beside = database.parent / "mlflow-artifacts" / run.info.run_id / "artifacts"
    matrix = json.loads((beside / "plots" / "confusion_matrix.json").read_text())
    assert matrix["slides"] == [[1, 0], [1, 0]]
    for plot in ("confusion_matrix.png", "learning_curves.png"):
        assert (beside / "plots" / plot).read_bytes().startswith(b"\x89PNG")
    environment = json.loads((beside / "environment.json").read_text())
    assert environment["command_line"] == ["train.py", "--recipe", "small"]
    assert environment["packages"]["torch"]
    assert environment["hardware"]["cores"] >= 1


def test_all_of_it_sent_again_changes_nothing(journal_of, uri, client):
    directory = journal_of(register="clotline")
    send(directory, uri)
    (directory / identity.SENT_NAME).unlink()  # the answers were lost, what was asked for was done
    send(directory, uri)
    (run,) = runs_in(client)
    assert history_of(client, run.info.run_id, "train_loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert history_of(client, run.info.run_id, "slide_roc_auc") == [(3, 0.75)]
    assert len(run.inputs.dataset_inputs) == 1
    assert len(client.search_model_versions("name = 'clotline'")) == 1
    assert len(client.search_logged_models([run.info.experiment_id])) == 1


def test_a_resumed_run_goes_on_in_the_same_run(journal_of, uri, client):
    first = journal_of(end=None, steps=range(4))
    send(first, uri)
    again = journal_of(resume=True, steps=range(2, 6), checkpoint=False)
    assert again == first
    send(again, uri)
    (run,) = runs_in(client)
    assert run.info.status == "FINISHED"
    assert [step for step, _ in history_of(client, run.info.run_id, "train_loss")] == list(range(6))


def test_training_that_starts_anew_is_another_run(journal_of, uri, client):
    send(journal_of(end=None, checkpoint=False), uri)
    send(journal_of(checkpoint=False), uri)
    assert len(runs_in(client)) == 2


def test_not_a_number_is_logged_as_such(journal_of, uri, client):
    directory = journal_of(end=None)
    Journal(directory / JOURNAL_NAME).metrics({"validation_loss": math.nan}, step=9)
    send(directory, uri)
    ((step, value),) = history_of(client, runs_in(client)[0].info.run_id, "validation_loss")
    assert step == 9
    assert math.isnan(value)


def test_more_numbers_than_one_call_takes(journal_of, uri, client):
    directory = journal_of(steps=range(2500), end=None)
    send(directory, uri)
    (run,) = runs_in(client)
    assert [step for step, _ in history_of(client, run.info.run_id, "train_loss")] == list(range(2500))


def test_what_cannot_be_taken_is_left_out_and_said(journal_of, uri, client, tmp_path):
    run_dir = tmp_path / "run 2"
    directory = journal_of(run_dir=run_dir, checkpoint=False)
    (run_dir / "held_out.csv").write_text("image_id,label\na,CE\n")
    (run_dir / "history.json").unlink()
    journal = Journal(directory / JOURNAL_NAME)
    journal.append("model", checkpoint="no such folder")
    journal.append("something new")
    journal.append("run", name="small", recipe={"seed": 4}, environment=_environment(directory))
    journal.metrics({"after": 1}, step=99)
    warnings = []
    sent = send(directory, uri, warnings)
    (run,) = runs_in(client)
    assert history_of(client, run.info.run_id, "after") == [(99, 1.0)]
    assert run.data.params["seed"] == "3"
    told = "\n".join(warnings)
    for part in ("cannot be drawn", "history.json is gone", "no such folder", "something new", "seed"):
        assert part in told
    assert sent.refused == 3


def _environment(directory):
    with (directory / JOURNAL_NAME).open() as stream:
        return json.loads(stream.readline())["environment"]


def test_a_deleted_run_is_not_taken_for_a_bad_record(journal_of, uri, client):
    directory = journal_of(end=None)
    send(directory, uri)
    (run,) = runs_in(client)
    client.delete_run(run.info.run_id)
    Journal(directory / JOURNAL_NAME).metrics({"after": 1}, step=99)
    with pytest.raises(store.StoreLostError, match="was deleted in MLflow"):
        send(directory, uri)
    client.restore_run(run.info.run_id)
    send(directory, uri)
    assert history_of(client, run.info.run_id, "after") == [(99, 1.0)]


def test_a_store_that_was_emptied_gets_the_whole_run(
    journal_of, uri, client, database, empty_database, tmp_path
):
    directory = journal_of(end=None)
    send(directory, uri)
    other = tmp_path / "other.db"
    shutil.copy(empty_database, other)
    send(directory, f"sqlite:///{other}")
    (run,) = runs_in(store.connect(f"sqlite:///{other}"))
    assert run.data.metrics["train_loss"] == pytest.approx(1 / 3)


def test_a_store_without_room_is_lost_not_refused(journal_of, uri, database, client):
    """SQLite's own limit of pages gives the error that a full disk gives: database or disk is full."""
    import sqlalchemy

    directory = journal_of(end=None, steps=range(2000))
    pages = []

    def limit(connection, _):
        connection.execute(f"PRAGMA max_page_count = {pages[0]}")

    send(directory, uri)
    (run,) = runs_in(client)
    Journal(directory / JOURNAL_NAME).metrics({f"name_{n}": n for n in range(3000)}, step=5000)
    engine = client._tracking_client.store.engine
    with engine.connect() as connection:
        pages.append(connection.exec_driver_sql("PRAGMA page_count").scalar() + 2)
    engine.dispose()
    sqlalchemy.event.listen(engine, "connect", limit)
    with pytest.raises(store.StoreLostError, match="full"):
        send(directory, uri)
    assert identity.read_sent(directory, uri).trouble
    sqlalchemy.event.remove(engine, "connect", limit)
    engine.dispose()
    sent = send(directory, uri)
    assert sent.trouble is None
    assert sent.refused == 0
    assert history_of(client, run.info.run_id, "name_2999") == [(5000, 2999.0)]


def test_two_senders_do_not_send_one_run(journal_of, uri):
    directory = journal_of(end=None)
    first = sender.Sender(directory, uri, warn=print)
    with pytest.raises(sender.LockedError):
        sender.Sender(directory, uri, warn=print)
    first.close()
    sender.Sender(directory, uri, warn=print).close()
