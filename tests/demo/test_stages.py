"""Stages run real Python processes; the modules that they run are written by the tests."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo.errors import StageFailed
from demo.stages import Stages, reason_in, tail_of, typed


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "logs").mkdir()
    return Stages(tmp_path / "logs", count=3)


def module(folder: Path, text: str) -> list[str | Path]:
    (folder / "stage_under_test.py").write_text(text)
    return ["stage_under_test", "--an-option"]


def test_the_documents_come_back_and_everything_is_in_the_log(
    stages: Stages, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = (
        "import sys, json; print('words'); print('{\"a\":1}'); print('noise', file=sys.stderr)\n"
        "print(json.dumps({'argv': sys.argv[1:]}))"
    )
    assert stages.run("one", "the first stage", module(tmp_path, text)) == [
        {"a": 1},
        {"argv": ["--an-option"]},
    ]
    log = (tmp_path / "logs" / "01-one.log").read_text()
    assert all(words in log for words in ("words", '{"a":1}', "noise"))
    out, err = capfd.readouterr()
    assert out == ""
    assert "[1/3] the first stage\n      $ python -m stage_under_test --an-option" in err
    (finished,) = stages.finished
    assert finished.name == "one"
    assert 0 < finished.wall_s < 30


def test_a_failure_shows_the_end_of_its_log(stages: Stages, tmp_path: Path) -> None:
    text = "import sys; print('why', file=sys.stderr); print('{}'); raise SystemExit(3)"
    with pytest.raises(StageFailed, match=r"(?s)the title: exit code 3.*01-bad.log.*why") as caught:
        stages.run("bad", "the title", module(tmp_path, text))
    assert caught.value.log.name == "01-bad.log"
    assert stages.finished == []


@pytest.mark.parametrize("text", ["print('done')", "", "print('{}'); print('more')", "print('{not json')"])
def test_without_a_result_in_the_last_line_it_failed(stages: Stages, tmp_path: Path, text: str) -> None:
    with pytest.raises(StageFailed, match="no JSON document"):
        stages.run("mute", "the title", module(tmp_path, text))


SERVER = """
import signal, sys, time
def stop(*_):
    print("stopped gracefully", flush=True)
    raise SystemExit({code})
signal.signal(signal.SIGINT, stop)
print("starting", flush=True)
print('{{"http":"127.0.0.1:1"}}', flush=True)
time.sleep(60)
"""


def test_a_server_runs_as_long_as_it_is_needed(stages: Stages, tmp_path: Path) -> None:
    with stages.serve("serve", "start", module(tmp_path, SERVER.format(code=0)), 20) as server:
        assert server == {"http": "127.0.0.1:1"}
    assert "stopped gracefully" in (tmp_path / "logs" / "01-serve.log").read_text()


def test_a_server_that_does_not_stop_cleanly_is_told(stages: Stages, tmp_path: Path) -> None:
    with (
        pytest.raises(StageFailed, match="stop the server: exit code 7"),
        stages.serve("serve", "start", module(tmp_path, SERVER.format(code=7)), 20),
    ):
        pass


def test_an_error_while_serving_is_not_hidden_and_stops_the_server(stages: Stages, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyError),
        stages.serve("serve", "start", module(tmp_path, SERVER.format(code=7)), 20),
    ):
        raise KeyError
    assert "stopped gracefully" in (tmp_path / "logs" / "01-serve.log").read_text()


def test_a_server_that_ends_early_is_told(stages: Stages, tmp_path: Path) -> None:
    with (
        pytest.raises(StageFailed, match=r"(?s)start: ended with exit code 4.*port in use"),
        stages.serve("serve", "start", module(tmp_path, "print('port in use'); raise SystemExit(4)"), 20),
    ):
        pass


def test_a_server_that_never_is_ready_is_stopped(stages: Stages, tmp_path: Path) -> None:
    started_s = time.monotonic()
    with (
        pytest.raises(StageFailed, match="not ready within 1 s"),
        stages.serve("serve", "start", module(tmp_path, "import time; time.sleep(60)"), 1),
    ):
        pass
    assert time.monotonic() - started_s < 20


def test_ctrl_c_stops_the_stage_and_what_it_started(tmp_path: Path) -> None:
    """Interrupted as by a terminal; the stage's own child writes a file when it is stopped."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "grandchild.py").write_text(
        "import pathlib, time\n"
        "try:\n    pathlib.Path('started').touch(); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    pathlib.Path('stopped').touch()\n"
    )
    module(
        tmp_path,
        f"import subprocess, sys\nsubprocess.run([sys.executable, 'grandchild.py'], cwd={str(tmp_path)!r})\n",
    )
    driver = (
        "import pathlib; from demo.stages import Stages\n"
        f"Stages(pathlib.Path({str(tmp_path / 'logs')!r}), 1).run('x', 'x', ['stage_under_test'])\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", driver], env={"PYTHONPATH": f"{root}:{tmp_path}"}, stderr=subprocess.DEVNULL
    )
    give_up_s = time.monotonic() + 20
    while not (tmp_path / "started").exists() and time.monotonic() < give_up_s:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) != 0
    assert (tmp_path / "stopped").exists()


def test_a_progress_bar_is_one_line_of_the_tail(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"first\n\r 10%\r 50%\r100%\nlast\n\n")
    assert tail_of(log) == ["first", "100%", "last"]


def test_an_error_of_ours_is_shown_without_the_traceback_of_a_launcher(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(
        b"error: an old one\n 10%\r 50%\rerror: no slides:\n  - line 2\nTraceback (most ...\n  File\n"
    )
    assert reason_in(log) == ["error: no slides:", "  - line 2"]
    log.write_bytes(b"Traceback (most recent call last):\nKeyError\n")
    assert reason_in(log) == ["Traceback (most recent call last):", "KeyError"]


def test_commands_are_shown_as_they_could_betyped() -> None:
    root = Path(__file__).parents[2]
    assert (
        typed(["slides", "demo", "--out", root / "runs" / "a b"]) == "python -m slides demo --out 'runs/a b'"
    )
    assert (
        typed(["accelerate.commands.launch", root / "training" / "train.py"])
        == "accelerate launch training/train.py"
    )
