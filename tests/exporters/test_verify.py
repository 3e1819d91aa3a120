"""verify finds everything that is not as it was written, and --deep what no longer answers as it did."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporters.__main__ import main
from exporters.errors import ReleaseError, ReleaseVersionError
from exporters.release_manifest import checksum, entries_of, release_id
from exporters.verify import verify

Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def release(release_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release_dir, tmp_path / "release"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def verified(release: Path, *more: str) -> tuple[int, dict[str, Any], str]:
        code = main(["verify", str(release), *more])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out else {}, captured.err

    return verified


def seal(release: Path) -> None:
    """Rewrite the manifest so that it fits to the files: what an attacker, or a broken exporter, would do."""
    path = release / "release.json"
    values = json.loads(path.read_text())
    del values["sha256"]
    entries = entries_of(release)
    values["files"] = {name: entry.model_dump() for name, entry in entries.items()}
    values["release_id"] = release_id({name: entry.sha256 for name, entry in entries.items()})
    path.write_text(json.dumps({**values, "sha256": checksum(values)}))


def test_a_release_that_was_not_touched_is_whole(release: Path, run: Run) -> None:
    code, document, err = run(release)
    assert (code, document["whole"], document["problems"]) == (0, True, [])
    assert "error" not in err
    assert verify(release).release_id == document["release_id"]


def test_everything_that_is_wrong_is_listed(release: Path, run: Run) -> None:
    flipped = release / "models/tile_network_onnx/1/model.onnx"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    with (release / "MODEL_CARD.md").open("a") as card:
        card.write("trust me")
    (release / "golden/0003.jpg").unlink()
    byte_code = release / "models/tile_preprocess/1/__pycache__"
    byte_code.mkdir()
    (byte_code / "model.cpython-311.pyc").write_bytes(b"")
    (release / "models/tile_classifier/2").mkdir()
    (release / "plots/notes.txt").write_text("extra")
    labels = release / "models/tile_classifier/labels.txt"
    labels.rename(release.parent / "labels.txt")
    labels.symlink_to("../../../labels.txt")
    os.mkfifo(release / "golden/pipe")
    code, document, err = run(release, "--deep")
    assert code == 1
    problems = [
        "MODEL_CARD.md is changed: it has",
        "golden/0003.jpg is missing",
        "golden/pipe is no plain file",
        "models/tile_classifier/2/ is extra",
        "models/tile_classifier/labels.txt is a link to ../../../labels.txt",
        "models/tile_network_onnx/1/model.onnx is changed: it has SHA-256",
        "models/tile_preprocess/1/__pycache__/ is extra: byte code",
        "plots/notes.txt is extra",
    ]
    assert len(document["problems"]) == len(problems)
    for told, wanted in zip(document["problems"], problems, strict=True):
        assert told.startswith(wanted)
        assert f"error: {told}" in err
    assert "no artefact was asked" in err
    with pytest.raises(ReleaseError, match="8 problems"):
        verify(release)


def test_a_link_in_place_of_a_directory_is_not_followed(release: Path) -> None:
    (release / "golden").rename(release.parent / "golden")
    (release / "golden").symlink_to("../golden")
    with pytest.raises(ReleaseError, match="golden is a link to") as caught:
        verify(release)
    assert any("golden/0000.jpg is missing" in problem for problem in caught.value.problems)


def test_a_changed_manifest_is_found(release: Path, run: Run) -> None:
    path = release / "release.json"
    path.write_text(path.read_text().replace('"squeezenet1_1"', '"resnet50"', 1))
    code, document, err = run(release)
    assert code == 1
    assert document["release_id"] is None
    assert "release.json: it was altered" in err


def test_a_release_that_was_sealed_again_is_not_the_one_asked_for(release: Path, run: Run) -> None:
    _, document, _ = run(release)
    asked_for = document["manifest_sha256"]
    assert run(release, "--sha256", asked_for)[0] == 0
    (release / "MODEL_CARD.md").write_text("# Trust me")
    seal(release)
    assert run(release)[0] == 0  # nothing in the release tells
    code, _, err = run(release, "--sha256", asked_for)
    assert code == 1
    assert "release.json is another one" in err


def test_what_is_no_release_exits_with_2(release: Path, tmp_path: Path, run: Run) -> None:
    path = release / "release.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 3'))
    for directory, told in (
        (release, "version 3, this Clotline reads"),
        (tmp_path / "none", "is no release"),
    ):
        code, document, err = run(directory)
        assert (code, document) == (2, {})
        assert told in err
        assert "Traceback" not in err
    with pytest.raises(ReleaseVersionError):
        verify(release)


def test_deep_asks_every_artefact_again(release: Path, run: Run) -> None:
    code, document, _ = run(release, "--deep")
    assert code == 0
    assert set(document["deep"]) == {"onnx", "torchscript"}
    assert all(asked["tiles"] == 6 and asked["max_abs_diff"] <= 1e-5 for asked in document["deep"].values())


def test_deep_finds_answers_of_another_network(
    release: Path, run: Run, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    # A manifest that was sealed again fits to its files; the golden tiles still tell.
    golden = release / "golden/golden.json"
    document = json.loads(golden.read_text())
    document["items"][0]["probabilities"].reverse()
    golden.write_text(json.dumps(document))
    (release / "models/tile_network_torchscript/1/model.pt").write_bytes(b"no zip file")
    seal(release)
    code, said, err = run(release, "--deep")
    assert code == 1
    assert "onnx: answers differ from golden.json" in err
    assert "torchscript: PyTorch cannot open" in err
    assert "Traceback" not in err
    assert set(said["deep"]) == {"onnx"}
