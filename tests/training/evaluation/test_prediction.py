"""The same answers, whatever tiles come from, and however many are computed at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slides import iter_tiles, open_slide
from slides.decode import decode_tile
from slides.labels import read_labels
from tests.training.evaluation.conftest import CLASS_NAMES, SPEC, patients_of
from training import checkpoint, network
from training.evaluation import networks
from training.evaluation.assignment import assign
from training.evaluation.candidates import models_of, read_candidates
from training.evaluation.data import open_data
from training.evaluation.prediction import Predictions, predict
from training.evaluation.sources import SlideFiles

CPU = torch.device("cpu")


def answered(paths: list[Path], data_dir: Path, batch_tiles: int | None = None) -> Predictions:
    models = models_of(read_candidates(paths))
    data = open_data(data_dir, None, [SPEC])
    return predict(
        models, assign(models, data.records, "all"), data.source, device=CPU, batch_tiles=batch_tiles
    )


@pytest.fixture(scope="module")
def path(save_tile_checkpoint: Any, slides_dir: Path) -> Path:
    return save_tile_checkpoint("predicting", slides_dir, patients_of(slides_dir)[:4])


def test_a_slide_is_the_mean_of_the_tiles_that_the_client_would_send(path: Path, slides_dir: Path) -> None:
    told = answered([path], slides_dir)
    model = checkpoint.load(path).model
    (answers,) = told.of_model.values()
    records = read_labels(slides_dir, class_names=CLASS_NAMES)
    assert [answer.record.image_id for answer in answers] == [record.image_id for record in records]
    for answer in answers[:3]:
        with open_slide(answer.record.path) as slide:
            refs, tiles = zip(*iter_tiles(slide, SPEC), strict=True)
            assert answer.slide.um_per_px == slide.um_per_px
        decoded_NHWC = np.stack([decode_tile(tile, SPEC.input_size_px) for tile in tiles])
        with torch.inference_mode():
            expected_TK = torch.softmax(model(torch.from_numpy(decoded_NHWC)), dim=1).numpy()
        assert answer.tiles.tile_probabilities_TK is not None
        np.testing.assert_allclose(answer.tiles.tile_probabilities_TK, expected_TK, atol=1e-5)
        np.testing.assert_allclose(answer.probabilities_K, expected_TK.mean(axis=0), atol=1e-5)
        assert answer.places is not None
        assert answer.places.x_px.tolist() == [ref.x_px for ref in refs]
        assert len(answer.slide.tiles) == 0, "bytes of tiles are not kept"


def test_the_size_of_a_batch_changes_nothing(path: Path, slides_dir: Path) -> None:
    one, many = (answered([path], slides_dir, batch_tiles) for batch_tiles in (1, 64))
    (ones,), (manys,) = one.of_model.values(), many.of_model.values()
    for few, lot in zip(ones, manys, strict=True):
        np.testing.assert_allclose(few.probabilities_K, lot.probabilities_K, atol=1e-5)
    assert one.fingerprint == many.fingerprint
    assert set(one.batch_tiles.values()) == {1}


def test_bad_slides_have_reasons_and_the_others_go_on(path: Path, copied_slides: Path) -> None:
    files = sorted((copied_slides / "train").iterdir())
    files[0].unlink()
    files[1].write_bytes(b"no slide at all, but some bytes")
    files[2].write_bytes(files[2].read_bytes()[:-50_000])
    told = answered([path], copied_slides)
    (answers,) = told.of_model.values()
    assert set(told.bad) == {file.stem for file in files[:3]}
    assert len(answers) == 7
    assert "there is no such slide" in told.bad[files[0].stem]
    assert all("\n" not in reason for reason in told.bad.values())


def test_a_bad_tile_file_does_not_spoil_its_batch(
    save_tile_checkpoint: Any, tiles_dir: Path, tmp_path: Path
) -> None:
    import shutil

    data = shutil.copytree(tiles_dir, tmp_path / "data")
    (data / "train" / "p03_1.jpg").write_bytes(b"torn")
    (data / "train" / "p05_0.jpg").unlink()
    path = save_tile_checkpoint("tiles", tiles_dir, [])
    told, whole = answered([path], data), answered([path], tiles_dir)
    assert set(told.bad) == {"p03_1", "p05_0"}
    (answers,), (all_answers,) = told.of_model.values(), whole.of_model.values()
    assert len(answers) == 46
    expected = {one.record.image_id: one.probabilities_K for one in all_answers}
    for answer in answers:
        np.testing.assert_allclose(answer.probabilities_K, expected[answer.record.image_id], atol=1e-5)


def test_the_fingerprint_is_that_of_slides_and_tiles(
    path: Path, copied_slides: Path, slides_dir: Path
) -> None:
    before = answered([path], slides_dir).fingerprint
    assert answered([path], copied_slides).fingerprint == before
    sorted((copied_slides / "train").iterdir())[0].unlink()
    assert answered([path], copied_slides).fingerprint != before


def test_a_store_gives_the_answers_of_the_slides(path: Path, slides_dir: Path, tmp_path: Path) -> None:
    from training.store.spec import StoreSpec
    from training.store.writer import write_store

    names = ("tile_size_px", "um_per_px", "tiles_per_slide", "min_tissue_share", "jpeg_quality")
    cut = StoreSpec(**{name: getattr(SPEC, name) for name in names})
    write_store(
        slides_dir, tmp_path / "store", cut, class_names=CLASS_NAMES, workers_count=1, show_progress=False
    )
    models = models_of(read_candidates([path]))
    data = open_data(None, tmp_path / "store", [SPEC])
    stored = predict(models, assign(models, data.records, "all"), data.source, device=CPU)
    cut_now = answered([path], slides_dir)
    (answers,), (expected,) = stored.of_model.values(), cut_now.of_model.values()
    assert stored.fingerprint == cut_now.fingerprint
    for answer, other in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer.probabilities_K, other.probabilities_K, atol=1e-6)
        assert answer.slide.um_per_px == pytest.approx(other.slide.um_per_px)
    rows = [0, 2]
    again = data.source.tiles_again(answers[0].slide, rows, SPEC)
    assert again == SlideFiles().tiles_again(expected[0].slide, rows, SPEC)


def test_the_batch_follows_the_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint.load(path).model
    monkeypatch.setattr(networks, "free_bytes", lambda device: 1)
    assert networks.fitting_batch(model, SPEC, CPU) == 1
    monkeypatch.setattr(networks, "free_bytes", lambda device: 2**50)
    assert networks.fitting_batch(model, SPEC, CPU) == networks.LARGEST_BATCH
    monkeypatch.undo()
    assert networks.free_bytes(CPU) > 2**20


def test_a_batch_that_a_gpu_cannot_hold_is_halved(
    path: Path, slides_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a GPU: the network refuses more than four tiles as torch does when memory runs out."""
    expected = answered([path], slides_dir, 16)
    forward = network.TileNetwork.forward
    sizes: list[int] = []

    def small_memory(self: network.TileNetwork, tiles_NHWC: torch.Tensor) -> torch.Tensor:
        if self.training is False and len(tiles_NHWC) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(tiles_NHWC))
        return forward(self, tiles_NHWC)

    monkeypatch.setattr(network.TileNetwork, "forward", small_memory)
    told = answered([path], slides_dir, 16)
    (answers,), (others,) = told.of_model.values(), expected.of_model.values()
    for answer, other in zip(answers, others, strict=True):
        np.testing.assert_allclose(answer.probabilities_K, other.probabilities_K, atol=1e-5)
    assert max(sizes) <= 4
    assert told.bad == {}
