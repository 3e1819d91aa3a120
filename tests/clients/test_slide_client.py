"""The client against a real Triton server (fixture `served_repository`), and where there is none."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.answers import ModelCard
from clients.errors import ClosedError, ModelMismatch, ModelNotReady, RequestRefused, ServerUnreachable
from clients.slide_client import SlideClient, batches
from slides.decode import encode_tile
from slides.errors import NoTissueError, SlideFileError
from slides.reader import open_slide
from slides.tissue import find_tiles, iter_tiles


def test_batches_keep_order_and_bounds() -> None:
    tiles = [b"1", b"22", b"333", b"4" * 90, b"5", b"6"]
    assert list(batches(iter(tiles), 2, 10)) == [[b"1", b"22"], [b"333"], [b"4" * 90], [b"5", b"6"]]
    assert list(batches(tiles, 3, 1000)) == [tiles[:3], tiles[3:]]
    assert list(batches([], 3, 1000)) == []


def test_a_server_that_is_not_there_is_told_before_the_slide_is_read(unused_port: int) -> None:
    with (
        SlideClient(f"127.0.0.1:{unused_port}", retries=1) as client,
        pytest.raises(ServerUnreachable, match=f"{unused_port}.*serving status"),
    ):
        client.predict("no such slide.tif")


def test_a_closed_client_says_so(unused_port: int) -> None:
    client = SlideClient(f"127.0.0.1:{unused_port}")
    client.close()
    with pytest.raises(ClosedError):
        client.classify_tiles([b"tile"])


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"batch": 0}, {"timeout_s": 0}, {"retries": -1}])
def test_impossible_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        SlideClient("localhost:8000", **wrong)


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, served_repository: Any) -> Iterator[SlideClient]:
    with SlideClient(url_of(served_repository, request.param)) as client:
        yield client


def url_of(served_repository: Any, protocol: str) -> str:
    url = served_repository.http_url if protocol == "http" else served_repository.grpc_url
    return url if "://" in url else f"{protocol}://{url}"


@pytest.fixture(scope="module")
def tiles() -> list[bytes]:
    """Nineteen different images: batches of every size are needed to send them."""
    rng = np.random.default_rng(5)
    return [encode_tile(rng.integers(0, 256, (96 + n, 120, 3), dtype=np.uint8), 90) for n in range(19)]


def test_the_specification_comes_from_the_server(client: SlideClient, served_repository: Any) -> None:
    assert len(client.spec.class_names) >= 2
    assert client.card.version.isdigit()
    assert client.card.max_batch >= 1
    assert "weights_sha256" in client.card.checkpoint


def test_a_slide_in_an_answer_out(client: SlideClient, slide_path: Path) -> None:
    prediction = client.predict(slide_path)
    assert (prediction.image_id, prediction.patient_id) == ("abc123_0", "abc123")
    assert tuple(prediction.probabilities) == client.spec.class_names
    assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert prediction.confidence == max(prediction.probabilities.values())
    assert prediction.slide_size_px == (2560, 2560)
    assert prediction.um_per_px == pytest.approx(0.5, rel=1e-3)
    with open_slide(slide_path) as slide:
        refs = find_tiles(slide, client.spec)
        data = [jpeg for _, jpeg in iter_tiles(slide, client.spec, refs)]
    assert [(tile.x_px, tile.y_px) for tile in prediction.tiles] == [(ref.x_px, ref.y_px) for ref in refs]
    direct_NK = client.classify_tiles(data)
    for tile, row_K in zip(prediction.tiles, direct_NK, strict=True):
        assert list(tile.probabilities.values()) == pytest.approx(row_K.tolist(), abs=1e-6)


def test_answers_keep_the_order_of_the_tiles(client: SlideClient, tiles: list[bytes]) -> None:
    forwards_NK = client.classify_tiles(tiles)
    assert forwards_NK.shape == (19, len(client.spec.class_names))
    np.testing.assert_allclose(client.classify_tiles(tiles[::-1])[::-1], forwards_NK, atol=1e-5)
    assert len({tuple(row) for row in forwards_NK.round(6).tolist()}) > 10  # or order could not be seen


def test_batch_and_protocol_do_not_show(served_repository: Any, tiles: list[bytes]) -> None:
    answers = []
    for protocol in ("http", "grpc"):
        for batch in (1, 3, 10_000):
            with SlideClient(url_of(served_repository, protocol), batch=batch, concurrency=3) as client:
                answers.append(client.classify(tiles))
    for answer in answers[1:]:
        np.testing.assert_allclose(answer.probabilities_NK, answers[0].probabilities_NK, atol=1e-5)
        np.testing.assert_array_equal(answer.label_index_N, answers[0].label_index_N)


def test_a_refusal_says_where_among_all_tiles(served_repository: Any, tiles: list[bytes]) -> None:
    with (
        SlideClient(url_of(served_repository, "http"), batch=2) as client,
        pytest.raises(RequestRefused, match=r"tile 1 of 2.*the request held tiles 4 to 5\)"),
    ):
        client.classify_tiles([*tiles[:5], b"no image", *tiles[5:8]])


def test_tiles_are_no_longer_cut_once_a_request_failed(client: SlideClient) -> None:
    ended = []

    def endless(card: ModelCard) -> Iterator[bytes]:
        try:
            while True:
                yield b"no image"
        finally:
            ended.append(True)

    with pytest.raises(RequestRefused) as caught:
        client._ask(endless, client._send)
    assert ended == [True]  # although the error still refers to the frames that cut
    assert caught.value.__traceback__ is not None


def test_after_a_release_the_specification_is_asked_for_again(
    client: SlideClient, tiles: list[bytes]
) -> None:
    version = client.card.version
    client._card = dataclasses.replace(client.card, version="999")  # as if it had been the one before
    assert client.classify_tiles(tiles[:3]).shape[0] == 3
    assert client.card.version == version


def test_releases_without_end_are_told(
    client: SlideClient, tiles: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = dataclasses.replace(client.card, version="999")
    client._card = None
    monkeypatch.setattr(client, "_ask_card", lambda: stale)
    with pytest.raises(ModelMismatch, match=r"version 999 was asked, \d+ answered, twice"):
        client.classify_tiles(tiles[:3])


def test_no_tile_no_answer(client: SlideClient) -> None:
    assert client.classify_tiles([]).shape == (0, len(client.spec.class_names))


def test_one_client_serves_many_threads(client: SlideClient, tiles: list[bytes]) -> None:
    expected_NK = client.classify_tiles(tiles)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for answer_NK in pool.map(client.classify_tiles, [tiles] * 6):
            np.testing.assert_allclose(answer_NK, expected_NK, atol=1e-5)


def test_bytes_that_are_no_image_are_refused_and_the_client_goes_on(
    client: SlideClient, tiles: list[bytes]
) -> None:
    for bad in (b"not an image", b"", tiles[0][:200]):
        with pytest.raises(RequestRefused):
            client.classify_tiles([tiles[0], bad])
    assert client.classify_tiles(tiles[:2]).shape[0] == 2


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_model_that_is_not_there(served_repository: Any, protocol: str) -> None:
    with (
        SlideClient(url_of(served_repository, protocol), model="no_such_model", retries=0) as client,
        pytest.raises(ModelNotReady, match="no_such_model"),
    ):
        client.spec  # noqa: B018


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_part_of_the_classifier_is_no_classifier(served_repository: Any, protocol: str) -> None:
    with (
        SlideClient(url_of(served_repository, protocol), model="tile_preprocess") as client,
        pytest.raises(ModelMismatch, match="clotline_spec"),
    ):
        client.spec  # noqa: B018


def test_the_other_protocols_port_is_told_as_such(served_repository: Any) -> None:
    grpc = served_repository.grpc_url.split("://")[-1]
    with (
        SlideClient(f"http://{grpc}", retries=0, timeout_s=5) as client,
        pytest.raises(ServerUnreachable, match="grpc://"),
    ):
        client.spec  # noqa: B018


def test_bad_slides_are_told_as_such(client: SlideClient, tmp_path: Path) -> None:
    with pytest.raises(SlideFileError):
        client.predict(tmp_path / "none.tif")
    (tmp_path / "empty.tif").touch()
    with pytest.raises(SlideFileError):
        client.predict(tmp_path / "empty.tif")


def test_empty_glass_has_no_answer(client: SlideClient, tmp_path: Path) -> None:
    import tifffile

    glass = tmp_path / "glass.tif"
    tifffile.imwrite(
        glass,
        np.full((1024, 1024, 3), 243, np.uint8),
        photometric="rgb",
        tile=(256, 256),
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )
    with pytest.raises(NoTissueError):
        client.predict(glass)
