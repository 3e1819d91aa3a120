"""The bare loop, on a real network file."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from perf.__main__ import main
from perf.errors import PerfError, PerfInputError
from perf.limit import (
    Layout,
    Loop,
    Sample,
    best,
    latency_layouts,
    median_sample,
    throughput_layouts,
    write_tiles,
)
from perf.served_work import ServedWork, served_work
from slides import native
from slides.decode import decode_tile


@pytest.fixture
def work(tiny_repository: Path) -> ServedWork:
    return served_work(tiny_repository)


def test_what_the_repository_does_is_read_from_its_configuration(
    work: ServedWork, tiny_repository: Path
) -> None:
    assert work.network == "tile_network_onnx"
    assert work.path == (tiny_repository / "tile_network_onnx" / "1" / "model.onnx").resolve()
    assert (work.runtime, work.input, work.probabilities, work.input_size_px) == (
        "onnxruntime",
        "tiles",
        "probabilities",
        32,
    )


def test_a_backend_without_a_bare_loop_is_refused(tiny_repository: Path, tmp_path: Path) -> None:
    for name in ("tile_classifier", "tile_network_onnx"):
        (tmp_path / name).mkdir()
        text = (tiny_repository / name / "config.pbtxt").read_text().replace('"onnxruntime"', '"pytorch"')
        (tmp_path / name / "config.pbtxt").write_text(text)
    with pytest.raises(PerfInputError, match="--limit-classifier"):
        served_work(tmp_path)


def test_processes_of_openvino_are_not_pinned_to_the_same_core(
    work: ServedWork, tiles: list[bytes], tmp_path: Path
) -> None:
    """Each process of a layout would otherwise pin its threads to the first core, and LIMIT be that of one core."""
    work = dataclasses.replace(work, runtime="openvino")
    with Loop(work, Layout(2, 1), write_tiles(str(tmp_path), tiles)) as loop:
        running = threading.Thread(target=loop.run, args=(0.5,))
        running.start()
        seen = set()
        while running.is_alive():  # threads are pinned while they infer
            for process in loop._processes:
                for thread in Path(f"/proc/{process.pid}/task").iterdir():
                    seen.add(frozenset(os.sched_getaffinity(int(thread.name))))
        running.join()
    assert seen == {frozenset(os.sched_getaffinity(0))}


@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(2, 1, 3)])
def test_the_loop_answers_as_the_network_does_and_counts_tiles(
    work: ServedWork, layout: Layout, tiles: list[bytes], tmp_path: Path
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(work.path), providers=["CPUExecutionProvider"])
    decoded = np.stack([decode_tile(tile, work.input_size_px) for tile in tiles])
    wanted = session.run(["probabilities"], {"tiles": decoded})[0]
    with Loop(work, layout, write_tiles(str(tmp_path), tiles)) as loop:
        np.testing.assert_allclose(loop.probabilities, wanted, atol=1e-6)
        assert len({round(row[0], 4) for row in loop.probabilities}) > len(tiles) // 2  # tiles are told apart
        sample = loop.run(0.2)
    # A call takes `batch` tiles; all processes work for the whole time.
    per_call = 1000 * layout.processes * layout.batch / sample.mean_call_ms
    assert sample.tiles_per_s == pytest.approx(per_call, rel=0.5)
    assert 0 < sample.cpu_s_per_1000 < 1000


def test_limit_decodes_with_what_it_is_told_to(work: ServedWork, tiles: list[bytes], tmp_path: Path) -> None:
    files = write_tiles(str(tmp_path), tiles)
    answers = []
    for decoder in native.DECODERS if native.load() else native.DECODERS[:1]:
        with Loop(dataclasses.replace(work, decoder=decoder), Layout(1, 1), files) as loop:
            answers.append(loop.probabilities)
    assert all(answer == answers[0] for answer in answers), "the pixels are the same"
    with pytest.raises(PerfInputError, match=r"slides\.native"):
        Loop(dataclasses.replace(work, decoder="another"), Layout(1, 1), files)


def test_a_network_that_cannot_be_opened_is_told_with_the_runtimes_words(
    work: ServedWork, tiles: list[bytes], tmp_path: Path
) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"nothing")
    wrong = ServedWork(**{**vars(work), "path": broken})
    with pytest.raises(PerfError, match="bare loop ended"):
        Loop(wrong, Layout(1, 1), write_tiles(str(tmp_path), tiles))


def test_layouts_use_all_cores_and_the_best_is_chosen_by_its_median() -> None:
    for cores in (1, 2, 8):
        assert all(layout.processes * layout.threads == cores for layout in throughput_layouts(cores))
        assert all(layout.processes == 1 and layout.batch == 1 for layout in latency_layouts(cores))
    slow, fast = Layout(2, 1), Layout(1, 2)
    found = {
        slow: [Sample(100, 10, 20, 20), Sample(900, 10, 2, 2), Sample(100, 10, 20, 20)],
        fast: [Sample(110, 12, 9, 9), Sample(90, 12, 9, 9), Sample(110, 12, 9, 9)],
    }
    assert best(found, by_latency=False) == fast
    assert best(found, by_latency=True) == fast
    assert median_sample(found[slow]) == Sample(100, 10, 20, 20)


def test_the_command_tells_every_layout(tiny_repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "limit",
        "--repository",
        str(tiny_repository),
        "--tile-size-px",
        "64",
        "--rounds",
        "1",
        "--seconds",
        "0.05",
    ]
    assert main(asked) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["tiles_per_s"] == max(row["tiles_per_s"] for row in answer["layouts"])
    assert answer["model"] == "tile_network_onnx"
    assert main([*asked, "--rounds", "0"]) == 2
