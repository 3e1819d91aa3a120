"""An ensemble of a learner and a tile network behind `slide_classifier`, on a real tritonserver; and its client."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tifffile

from clients import SlideClient
from clients.bags import BagAnswer
from clients.errors import ModelMismatch, ModelNotReady, RequestRefused
from clients.heatmap import draw_heatmap
from exporters.errors import ParityError
from exporters.formats import formats_named
from exporters.proving_server import ProvingServer, proving_server
from exporters.serving_options import ServingOptions
from exporters.slide import export
from exporters.slide.export import SlideDraft, check_slides_on, draft_slides
from exporters.slide.parity import slide_answer
from exporters.slide.served import tile_tensor
from exporters.slide.source import Bag, decoded
from exporters.triton_config import CONFIG_FILENAME, preprocess_config, to_text

from .conftest import SPEC, blotchy_tiles

PREPROCESS = Path(export.__file__).parents[2] / "model_repository" / "tile_preprocess" / "1" / "model.py"
IN_FLIGHT = 64


@dataclass(frozen=True)
class Served:
    """A server, what it serves, and where."""

    server: ProvingServer
    draft: SlideDraft
    http_url: str
    grpc_url: str

    def expected(self, tiles: tuple[bytes, ...]) -> dict[str, np.ndarray]:
        """What PyTorch and NumPy answer to a bag."""
        tiles_NHWC = decoded(Bag("x", None, tiles), SPEC.input_size_px)
        source = self.draft.source
        return dict(slide_answer(source, [member.embed(tiles_NHWC) for member in source.members]))


@pytest.fixture(scope="module")
def served(ensemble_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    draft = draft_slides(ensemble_path, formats_named(["onnx"]), ServingOptions(max_batch=2))
    models = tmp_path_factory.mktemp("release") / "models"
    config = preprocess_config(
        input_size_px=SPEC.input_size_px,
        max_batch=2,
        instances=2,
        max_tile_bytes=10**6,
        max_tile_pixels=10**6,
    )
    files = {
        **draft.files,
        "tile_preprocess/1/model.py": PREPROCESS.read_bytes(),
        f"tile_preprocess/{CONFIG_FILENAME}": to_text(config).encode(),
    }
    for path, content in files.items():
        (models / path).parent.mkdir(parents=True, exist_ok=True)
        (models / path).write_bytes(content)
    with proving_server(models, ["tile_preprocess", *draft.models], announce=lambda text: None) as server:
        yield Served(server, draft, *(f"{name}://{server._addresses[name]}" for name in ("http", "grpc")))


@pytest.fixture
def client(served: Served) -> Iterator[SlideClient]:
    with SlideClient(served.http_url, model="slide_classifier") as opened:
        yield opened


def agree(answer: BagAnswer, wanted: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(answer.probabilities_K, wanted["probabilities"], atol=1e-4)
    np.testing.assert_allclose(answer.attention_T, wanted["attention"], atol=1e-4)
    assert answer.label_index == wanted["label_index"][0]
    assert answer.mutual_information == pytest.approx(float(wanted["mutual_information"][0]), abs=1e-4)
    assert answer.entropy == pytest.approx(float(wanted["entropy"][0]), abs=1e-4)
    assert answer.answered == wanted["answered"][0]


def test_the_server_answers_as_pytorch_over_both_protocols(served: Served) -> None:
    proven = check_slides_on(served.server, served.draft)
    for protocol in ("http", "grpc"):
        assert proven["slide_classifier"][protocol]["tiles"] == 6
        assert proven["slide_classifier"][protocol]["max_abs_diff"] <= 1e-4


def test_a_server_that_answers_something_else_does_not_pass(served: Served) -> None:
    (first, *rest) = served.draft.expected.answers
    wrong = {**first, "attention": first["attention"] + np.array([0.01, 0, -0.01], np.float32)}
    expected = dataclasses.replace(served.draft.expected, answers=(wrong, *rest))
    faulty = dataclasses.replace(served.draft, expected=expected)
    with pytest.raises(ParityError, match="slide_classifier over http, slide p0_0: attention differs"):
        check_slides_on(served.server, faulty)


@pytest.mark.parametrize("tiles", [1, 2, 150])
def test_bags_of_any_size(client: SlideClient, served: Served, tiles: int) -> None:
    bag = blotchy_tiles(tiles, tiles)
    answer = client.classify_bag(bag)
    agree(answer, served.expected(bag))
    assert answer.release == "slide_classifier/1"


def test_a_broken_tile_fails_its_slide_alone_and_is_named(served: Served) -> None:
    good = blotchy_tiles(5, 1)
    bad = (*good[:3], b"\xff\xd8 broken", *good[4:])
    with (
        SlideClient(served.grpc_url, model="slide_classifier", concurrency=8) as client,
        concurrent.futures.ThreadPoolExecutor(8) as threads,
    ):
        asked = [threads.submit(client.classify_bag, bad if n % 4 == 1 else good) for n in range(16)]
        for n, future in enumerate(asked):
            if n % 4 == 1:
                with pytest.raises(RequestRefused, match=r"refused: tile 3 of 5: ") as caught:
                    future.result()
                assert caught.value.status == "StatusCode.INVALID_ARGUMENT"
            else:
                agree(future.result(), served.expected(good))


def test_the_limits_of_a_bag(served: Served) -> None:
    for tiles in ((), blotchy_tiles(2, 1) * 513):
        told = rf"\[400\] the bag has {len(tiles)} tiles; from 1 to 1024 are taken"
        with pytest.raises(ParityError, match=told):
            served.server.ask("http", "slide_classifier", {"tiles": tile_tensor(tiles)}, ["probabilities"])


def test_many_slides_in_flight(served: Served) -> None:
    bags = [blotchy_tiles(3, 100 + n % 4) for n in range(2 * IN_FLIGHT)]
    wanted = [served.expected(bag) for bag in bags[:4]]
    with (
        SlideClient(served.grpc_url, model="slide_classifier", concurrency=IN_FLIGHT, timeout_s=60) as client,
        concurrent.futures.ThreadPoolExecutor(IN_FLIGHT) as threads,
    ):
        for n, answer in enumerate(threads.map(client.classify_bag, bags)):
            agree(answer, wanted[n % 4])


def test_a_client_predicts_a_slide_with_attention(
    served: Served, client: SlideClient, tmp_path: Path
) -> None:
    path = tmp_path / "abc_0.tif"
    rng = np.random.default_rng(3)
    slide_HWC = np.full((512, 512, 3), 243, np.uint8)
    slide_HWC[64:448, 64:448] = rng.normal((190, 90, 140), 22, (384, 384, 3)).clip(0, 255)
    tifffile.imwrite(
        path,
        slide_HWC,
        photometric="rgb",
        tile=(128, 128),
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )
    prediction = client.predict(path)
    assert prediction.model == "slide_classifier"
    assert len(prediction.tiles) == SPEC.tiles_per_slide
    assert sum(tile.attention or 0 for tile in prediction.tiles) == pytest.approx(1, abs=1e-4)
    assert prediction.probabilities[prediction.label] == prediction.confidence
    json.dumps(prediction.to_dict())
    drawn_HWC = draw_heatmap(np.full((400, 400, 3), 250, np.uint8), prediction)
    assert drawn_HWC.std() > 0
    with SlideClient(served.http_url, model="auto") as either:
        assert either.predict(path) == prediction
    ran = subprocess.run(
        [sys.executable, "-m", "clients", "predict", str(path), "--url", served.http_url, "--model", "auto"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "asking slide_classifier" in ran.stderr
    (said,) = json.loads(ran.stdout.splitlines()[-1])["slides"]
    assert said["probabilities"] == dict(prediction.probabilities)


def test_what_the_wrong_kind_of_model_is_asked(served: Served, client: SlideClient) -> None:
    with pytest.raises(ModelMismatch, match="tile_classifier"):
        client.classify(blotchy_tiles(1, 1))
    with SlideClient(served.http_url, retries=0) as tiles, pytest.raises(ModelNotReady):
        tiles.classify(blotchy_tiles(1, 1))
    with (
        SlideClient(served.http_url, model="tile_encoder_onnx_0") as part,
        pytest.raises(ModelMismatch, match="clotline_spec"),
    ):
        part.classify_bag(blotchy_tiles(1, 1))
