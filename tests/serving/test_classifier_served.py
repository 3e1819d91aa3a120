"""`tile_classifier` on a real tritonserver, asked with plain tritonclient: good tiles, bad tiles, neighbours."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image

from slides.decode import encode_tile
from tests.conftest import ServedRepository

SIDE_PX = 64
RNG = np.random.default_rng(11)
PIXELS_HWC = np.kron(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(PIXELS_HWC), "JPEG", exif=exif)


RGB = Image.fromarray(PIXELS_HWC)
GOOD = {
    "jpeg": encode_tile(PIXELS_HWC, 90),
    "png": encoded(RGB, "PNG"),
    "cmyk": encoded(RGB.convert("CMYK"), "JPEG"),
    "alpha": encoded(RGB.convert("RGBA"), "PNG"),
    "16 bit": encoded(Image.fromarray(PIXELS_HWC[..., 0].astype(np.uint16) * 257), "PNG"),
    "exif": rotated_by_exif(),
}
BAD = {
    "empty": (b"", "no bytes"),
    "text": (b"this is no image", "tile 0 of 1"),
    "truncated": (GOOD["jpeg"][: len(GOOD["jpeg"]) // 2], "tile 0 of 1"),
    "1 x 1": (encoded(RGB.resize((1, 1)), "PNG"), "1 x 1"),
    "webp": (encoded(RGB, "WEBP"), "WebP"),
    "bomb": (encoded(Image.new("1", (30_000, 30_000)), "PNG"), "30000"),
}


def ask(client: triton.InferenceServerClient, tiles: list[bytes], **output: Any) -> Any:
    tensor = triton.InferInput("tile", [len(tiles), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(tiles, dtype=np.object_)[:, None])
    wanted = [triton.InferRequestedOutput(name, **output) for name in ("probabilities",)]
    return client.infer("tile_classifier", [tensor], outputs=wanted).as_numpy("probabilities")


@pytest.fixture
def client(served_repository: ServedRepository) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(served_repository.http_url, concurrency=8)


@pytest.mark.parametrize("kind", GOOD)
def test_every_kind_of_tile_is_answered(client: triton.InferenceServerClient, kind: str) -> None:
    answer_1K = ask(client, [GOOD[kind]])
    assert answer_1K.shape == (1, 2)
    assert abs(answer_1K.sum() - 1) < 1e-5


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_tile_is_refused_with_400_and_says_why(client: triton.InferenceServerClient, kind: str) -> None:
    data, says = BAD[kind]
    with pytest.raises(triton.InferenceServerException) as refused:
        ask(client, [data])
    assert refused.value.status() == "400"
    assert says in str(refused.value)
    assert "Traceback" not in str(refused.value)


def test_a_bad_tile_is_named_within_its_request(client: triton.InferenceServerClient) -> None:
    with pytest.raises(triton.InferenceServerException, match="tile 2 of 3"):
        ask(client, [GOOD["jpeg"], GOOD["png"], b"broken"])


def test_bad_requests_harm_no_neighbour(client: triton.InferenceServerClient) -> None:
    expected_1K = ask(client, [GOOD["jpeg"]])
    pending = []
    for number in range(60):
        tensor = triton.InferInput("tile", [1, 1], "BYTES")
        data = b"broken" if number % 3 == 0 else GOOD["jpeg"]
        tensor.set_data_from_numpy(np.array([[data]], dtype=np.object_))
        pending.append((number, client.async_infer("tile_classifier", [tensor])))
    for number, request in pending:
        if number % 3 == 0:
            with pytest.raises(triton.InferenceServerException):
                request.get_result()
        else:
            assert np.abs(request.get_result().as_numpy("probabilities") - expected_1K).max() < 1e-5


def test_label_names_come_from_triton(client: triton.InferenceServerClient) -> None:
    probability, _, name = ask(client, [GOOD["jpeg"]], class_count=1)[0][0].decode().split(":")
    answer_K = ask(client, [GOOD["jpeg"]])[0]
    assert name == ("CE", "LAA")[int(answer_K.argmax())]
    assert abs(float(probability) - answer_K.max()) < 1e-4


def test_the_control_api_is_closed_to_clients(client: triton.InferenceServerClient) -> None:
    with pytest.raises(triton.InferenceServerException):
        client.unload_model("tile_classifier")
    assert client.is_model_ready("tile_classifier")
