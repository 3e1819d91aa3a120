from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training import tracking
from training.tracking import TrackingOptions, journal
from training.tracking.trackers import MLflowTracker, TensorBoardTracker


def scalars(directory, name):
    return [(event.step, event.value) for event in EventAccumulator(str(directory)).Reload().Scalars(name)]


def test_accelerate_logs_to_both(tmp_path):
    written = journal.Journal(tmp_path / "journal.jsonl")
    trackers = [MLflowTracker(written), TensorBoardTracker(tmp_path / "tensorboard", resumed=False)]
    accelerator = Accelerator(cpu=True, log_with=trackers)
    accelerator.init_trackers("clotline")
    for step in range(3):
        accelerator.log({"train_loss": 0.5 * step, "epoch": 1}, step=step)
    accelerator.end_training()
    steps = [record["step"] for record, _ in journal.read(tmp_path / "journal.jsonl")]
    assert steps == [0, 1, 2]
    assert scalars(tmp_path / "tensorboard", "train_loss") == [(0, 0.0), (1, 0.5), (2, 1.0)]


def test_tensorboard_shows_repeated_steps_of_a_resumed_run_once(tmp_path):
    options = TrackingOptions(trackers=("tensorboard",))
    first = tracking.start(options, recipe={}, run_dir=tmp_path, run_name="x")
    for step in range(8):
        first.log({"train_loss": 1.0}, step=step)
    first.trackers[0].close()  # as far as it came
    second = tracking.start(options, recipe={}, run_dir=tmp_path, run_name="x", resume=True)
    for step in range(5, 10):
        second.log({"train_loss": 2.0}, step=step)
    assert second.finish(metrics={"accuracy": 0.5}) == {}
    values = scalars(tmp_path / "tensorboard", "train_loss")
    assert values == [(step, 1.0 if step < 5 else 2.0) for step in range(10)]
    assert scalars(tmp_path / "tensorboard", "accuracy") == [(10, 0.5)]


def test_a_folder_that_cannot_be_written_warns_once(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    tracker = TensorBoardTracker(tmp_path / "file", resumed=False)
    tracker.log({"train_loss": 1.0}, step=0)
    tracker.log({"train_loss": 1.0}, step=1)
    tracker.finish()
    assert capfd.readouterr().err.count("warning") == 1
