"""A slide release that answers again as it did, and one that does not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from exporters.formats import formats_named
from exporters.serving_options import ServingOptions
from exporters.slide.export import draft_slides
from exporters.slide.verification import answers_again


@pytest.fixture(scope="module")
def release(slide_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SimpleNamespace]:
    """The files of a release, and what its manifest says of classifiers and specification."""
    draft = draft_slides(slide_dir, formats_named(["onnx"]), ServingOptions(max_batch=2))
    root = tmp_path_factory.mktemp("release")
    for folder, files in (("models", draft.files), ("golden", draft.golden)):
        for path, content in files.items():
            (root / folder / path).parent.mkdir(parents=True, exist_ok=True)
            (root / folder / path).write_bytes(content)
    entries = {name: SimpleNamespace(**entry) for name, entry in draft.classifiers.items()}
    return root, SimpleNamespace(classifiers=entries, spec=draft.spec.as_dict())


def test_it_answers_again(release: tuple[Path, SimpleNamespace]) -> None:
    assert answers_again(*release) == []


def test_another_answer_is_told(release: tuple[Path, SimpleNamespace]) -> None:
    golden = release[0] / "golden" / "golden.json"
    before = golden.read_text()
    document = json.loads(before)
    document["items"][2]["attention"][0] += 0.01
    golden.write_text(json.dumps(document))
    (told,) = answers_again(*release)
    assert told == "slide_classifier: bag p2_0: attention differ by 0.01 (allowed 0.0001)"
    golden.write_text(before)


def test_a_damaged_head_and_a_missing_encoder_are_told(release: tuple[Path, SimpleNamespace]) -> None:
    head = release[0] / "models/slide_head_onnx/1/model.onnx"
    whole = head.read_bytes()
    head.write_bytes(whole[:100])
    (told,) = answers_again(*release)
    assert "ONNX Runtime cannot open the slide head" in told
    head.write_bytes(whole)
    (release[0] / "models/tile_encoder_onnx/1/model.onnx").unlink()
    (told,) = answers_again(*release)
    assert "model.onnx" in told
