from __future__ import annotations

import hashlib
import io
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from slides import decode as decoding
from slides.decode import MAX_TILE_BYTES, MIN_TILE_SIDE_PX, decode_tile, encode_tile
from slides.errors import TileDecodeError

GOLDEN_TILE = Path(__file__).with_name("golden_tile.jpg")
# Side of the result -> sha256: 96 is only decoded, 48 and 24 are scaled in the DCT domain, 40 is scaled there and
# then resized, 128 is enlarged.
GOLDEN_SHA256 = {
    96: "7514bdff98b996d6486690abc10cb6f78adc67d9a454f5113399686c7bb59cf8",
    48: "2e14b2b5ad2a789457c61f70f784c46dc2981460406b658ab249c0440ead0df3",
    24: "da342080a06d4c4c4e31701541dbbea7fd9b4b299d4c90a43638351986e9309e",
    40: "0129a185bd0381ad495025b2294e1f0e82a737c00fae2c0ba0abaacb53194288",
    128: "ab1896dfbdbf507ecd629b04378b90fb8f8e154df1336ab43c0e647f15c72609",
}


def picture(height_px: int = 96, width_px: int = 96, channels: int = 3) -> NDArray[np.uint8]:
    """Smooth, so that what a lossy decoder makes of it may be compared with the original."""
    y, x = np.mgrid[:height_px, :width_px]
    waves = [127 + 100 * np.sin(x / (9 + 2 * k) + k) * np.cos(y / (11 - k)) for k in range(channels)]
    return np.stack(waves, axis=2).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def jpeg(image_HWC: NDArray[np.uint8] | None = None, **options: object) -> bytes:
    image = Image.fromarray(picture() if image_HWC is None else image_HWC)
    return saved(image, "JPEG", **{"quality": 95, "subsampling": 0, **options})


def png(image: Image.Image) -> bytes:
    return saved(image, "PNG")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def reason_of(data: bytes, **limits: int) -> str:
    with pytest.raises(TileDecodeError) as caught:
        decode_tile(data, 64, **limits)
    assert len(str(caught.value)) > 15
    return caught.value.reason


@pytest.mark.parametrize("size_px", [96, 48, 40, 24, 128])
def test_golden_tile(size_px: int) -> None:
    """The same array in training, client and server, whatever versions of the decoders are installed."""
    tile_HWC = decode_tile(GOLDEN_TILE.read_bytes(), size_px)
    assert hashlib.sha256(tile_HWC.tobytes()).hexdigest() == GOLDEN_SHA256[size_px]


@pytest.mark.parametrize("size_px", [1, 11, 12, 13, 24, 40, 48, 49, 95, 96, 97, 200])
def test_jpeg_follows_the_documented_rule(size_px: int) -> None:
    """Checked against Pillow's own build of libjpeg-turbo, told the factor that the rule gives."""
    data = GOLDEN_TILE.read_bytes()
    factor = max(f for f in (1, 2, 4, 8) if f == 1 or -(-96 // f) >= size_px)
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (96 // factor, 96 // factor))
    reduced_HWC = np.asarray(image)
    assert reduced_HWC.shape == (96 // factor, 96 // factor, 3)
    expected_HWC = cv2.resize(reduced_HWC, (size_px, size_px), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(decode_tile(data, size_px), expected_HWC)


def test_sides_that_do_not_divide_by_the_factor() -> None:
    data = simplejpeg.encode_jpeg(picture(101, 157), 90, "RGB", "420")
    reduced_HWC = simplejpeg.decode_jpeg(data, "RGB", min_height=26, min_width=40)
    assert reduced_HWC.shape == (26, 40, 3), "a quarter of each side, rounded up"
    np.testing.assert_array_equal(decode_tile(data, 26), cv2.resize(reduced_HWC, (26, 26)))
    assert decode_tile(data, 51).shape == (51, 51, 3)


@pytest.mark.parametrize("size_px", [48, 96, 100])
@pytest.mark.parametrize("make", [jpeg, lambda: png(Image.fromarray(picture()))])
def test_the_result_is_plain_rgb_of_ones_own(make: Callable[[], bytes], size_px: int) -> None:
    tile_HWC = decode_tile(make(), size_px)
    assert tile_HWC.shape == (size_px, size_px, 3)
    assert tile_HWC.dtype == np.uint8
    assert tile_HWC.flags.c_contiguous
    tile_HWC[:] = 0  # writable


def test_other_kinds_of_bytes_are_taken_too() -> None:
    data = jpeg()
    np.testing.assert_array_equal(decode_tile(memoryview(data), 48), decode_tile(data, 48))  # type: ignore[arg-type]


def test_png_is_exact_and_reduced_with_a_box() -> None:
    image_HWC = picture()
    np.testing.assert_array_equal(decode_tile(png(Image.fromarray(image_HWC)), 96), image_HWC)
    mean_HWC = image_HWC.reshape(48, 2, 48, 2, 3).mean((1, 3))
    assert np.abs(decode_tile(png(Image.fromarray(image_HWC)), 48) - mean_HWC).max() <= 0.5


def test_encoded_tiles_come_back() -> None:
    image_HWC = picture()
    data = encode_tile(image_HWC[:, ::-1], 95)
    assert simplejpeg.decode_jpeg_header(data)[3] == "444"
    assert np.abs(decode_tile(data, 96).astype(int) - image_HWC[:, ::-1]).mean() < 1.5


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
def test_every_subsampling(subsampling: str) -> None:
    data = simplejpeg.encode_jpeg(picture(), 95, "RGB", subsampling)
    assert np.abs(decode_tile(data, 96).astype(int) - picture()).mean() < 4


def test_grey_jpeg_palette_png_and_one_bit_png() -> None:
    grey_HW = picture(channels=1)[:, :, 0]
    tile_HWC = decode_tile(jpeg(grey_HW), 96)
    assert np.abs(tile_HWC.astype(int) - grey_HW[:, :, None]).mean() < 1.5
    palette = Image.fromarray(picture()).quantize(64)
    np.testing.assert_array_equal(decode_tile(png(palette), 96), np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(grey_HW).convert("1")
    np.testing.assert_array_equal(decode_tile(png(bits), 96)[:, :, 0] > 0, np.asarray(bits))


def test_cmyk_jpeg_is_converted() -> None:
    image = Image.fromarray(picture()).convert("CMYK")
    tile_HWC = decode_tile(saved(image, "JPEG", quality=95), 96)
    assert np.abs(tile_HWC.astype(int) - np.asarray(image.convert("RGB"))).mean() < 3


def test_sixteen_bits_keep_their_high_byte() -> None:
    grey_HW = np.arange(96 * 96, dtype=np.uint16).reshape(96, 96) * 7
    tile_HWC = decode_tile(png(Image.fromarray(grey_HW)), 96)
    np.testing.assert_array_equal(tile_HWC, np.repeat((grey_HW >> 8)[:, :, None], 3, axis=2))
    rgb_HWC = np.stack([grey_HW, grey_HW[::-1], grey_HW.T], axis=2)
    encoded, data = cv2.imencode(".png", rgb_HWC[:, :, ::-1])
    assert encoded
    np.testing.assert_array_equal(decode_tile(data.tobytes(), 96), rgb_HWC >> 8)


def test_alpha_is_composited_on_white() -> None:
    rgba_HWC = np.dstack([picture(), np.full((96, 96), 255, np.uint8)])
    rgba_HWC[:48, :, 3] = 0
    rgba_HWC[48:, :48] = (0, 0, 0, 128)
    tile_HWC = decode_tile(png(Image.fromarray(rgba_HWC)), 96)
    assert (tile_HWC[:48] == 255).all()
    assert (tile_HWC[48:, :48] == 127).all()
    np.testing.assert_array_equal(tile_HWC[48:, 48:], picture()[48:, 48:])
    grey_alpha = Image.fromarray(rgba_HWC).convert("LA")
    assert (decode_tile(png(grey_alpha), 96)[:48] == 255).all()


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize(
    ("orientation", "turned"), [(3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)]
)
def test_exif_rotation_is_applied(
    orientation: int, turned: Callable[[NDArray[np.uint8]], NDArray[np.uint8]], byte_order: str
) -> None:
    upright = jpeg()
    tiff = (b"II*\0" if byte_order == "<" else b"MM\0*") + struct.pack(
        byte_order + "IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0
    )
    segment = b"Exif\0\0" + tiff
    rotated = upright[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + upright[2:]
    expected_HWC = turned(np.asarray(Image.open(io.BytesIO(upright))))
    np.testing.assert_array_equal(decode_tile(rotated, 96), expected_HWC)


def test_exif_without_rotation_or_with_nonsense_changes_nothing() -> None:
    upright = jpeg()
    for exif in (
        b"",
        b"II",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9,
        b"MM\0*" + b"\0" * 30,
    ):
        segment = b"Exif\0\0" + exif
        data = upright[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + upright[2:]
        np.testing.assert_array_equal(decode_tile(data, 48), decode_tile(upright, 48))


def test_not_an_image() -> None:
    assert reason_of(b"") == "empty"
    assert reason_of(b"hello, I am no image") == "not_an_image"
    assert reason_of(bytes(1000)) == "not_an_image"


@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "GIF", "BMP", "JPEG2000"])
def test_other_formats_are_refused_by_name(kind: str) -> None:
    data = saved(Image.fromarray(picture()), kind)
    assert reason_of(data) == "unsupported_format"
    with pytest.raises(
        TileDecodeError, match=f"(?i)tile is {kind.replace('JPEG2000', 'JPEG 2000')}; JPEG and PNG"
    ):
        decode_tile(data, 64)


def test_one_pixel_and_the_smallest_tile() -> None:
    for side_px in (1, MIN_TILE_SIDE_PX - 1):
        assert reason_of(jpeg(picture(side_px, side_px))) == "too_small"
        assert reason_of(png(Image.fromarray(picture(side_px, 64)))) == "too_small"
    assert decode_tile(jpeg(picture(MIN_TILE_SIDE_PX, MIN_TILE_SIDE_PX)), 64).shape == (64, 64, 3)


def test_too_many_bytes() -> None:
    assert reason_of(jpeg() + bytes(MAX_TILE_BYTES)) == "too_many_bytes"
    assert reason_of(jpeg(), max_bytes=100) == "too_many_bytes"


def test_bombs_are_refused_from_their_headers() -> None:
    side = struct.pack(">II", 60_000, 60_000)
    pixels = zlib.compress(bytes(2_000_000), 9)
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", side + b"\x08\x02\0\0\0") + png_chunk(b"IDAT", pixels)
    started_s = time.perf_counter()
    assert reason_of(bomb + png_chunk(b"IEND", b"")) == "too_many_pixels"
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    assert reason_of(bytes(data)) == "too_many_pixels"
    assert time.perf_counter() - started_s < 0.1
    assert reason_of(jpeg(), max_pixels=96 * 96 - 1) == "too_many_pixels"
    assert decode_tile(jpeg(), 64, max_pixels=96 * 96).shape == (64, 64, 3)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])  # the fast decoder, and Pillow
def test_a_sequential_jpeg_with_further_scans_is_refused(mode: str) -> None:
    """It is not counted how many they are: the decoder stops at the second one."""
    data = saved(Image.fromarray(picture()).convert(mode), "JPEG")
    scan = data[data.index(b"\xff\xda") : -2]
    assert reason_of(data[:-2] + scan * 500 + data[-2:]) == "damaged"


def test_a_jpeg_that_ends_where_its_scan_begins() -> None:
    data = jpeg()
    for length in range(4):
        assert reason_of(data[: data.index(b"\xff\xda") + 2 + length]) in ("truncated", "damaged")


def test_a_progressive_jpeg_is_read_and_one_of_a_thousand_scans_refused() -> None:
    data = jpeg(progressive=True)
    baseline_HWC = decode_tile(jpeg(), 96)
    assert np.abs(decode_tile(data, 96).astype(int) - baseline_HWC).max() <= 1
    scan = data.index(b"\xff\xda")
    assert (
        reason_of(data[:scan] + data[scan:-2] + data[scan : scan + 60] * 1000 + b"\xff\xd9")
        == "too_many_scans"
    )


def test_truncated_anywhere() -> None:
    for data in (
        jpeg(),
        jpeg(progressive=True),
        saved(Image.fromarray(picture()).convert("CMYK"), "JPEG"),
        png(Image.fromarray(picture())),
    ):
        for length in range(8, len(data) - 2, max(1, len(data) // 61)):
            assert reason_of(data[:length]) in ("truncated", "damaged")
        assert reason_of(data[: len(data) // 2]) == "truncated"


def test_whatever_the_bytes_are_only_our_error_comes_out() -> None:
    rng = np.random.default_rng(0)
    originals = [
        jpeg(),
        jpeg(progressive=True),
        png(Image.fromarray(picture()).quantize(16)),
        GOLDEN_TILE.read_bytes(),
    ]
    refused = 0
    for data in originals:
        for _ in range(150):
            bad = bytearray(data)
            for place in rng.integers(2, len(bad), rng.integers(1, 6)):
                bad[place] = rng.integers(256)
            try:
                assert decode_tile(bytes(bad), 64, max_pixels=10**6).shape == (64, 64, 3)
            except TileDecodeError:
                refused += 1
    assert refused > 50


def ratio_in_turns(ours: Callable[[], object], theirs: Callable[[], object], times: int) -> float:
    """Time of one over that of the other, of each the least of many; in turns, because the machine is shared."""

    def seconds(work: Callable[[], object]) -> float:
        started_s = time.perf_counter()
        work()
        return time.perf_counter() - started_s

    pairs = [(seconds(ours), seconds(theirs)) for _ in range(times)]
    ours_s, theirs_s = (min(column) for column in zip(*pairs, strict=True))
    return ours_s / theirs_s


def test_the_header_costs_little_beside_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `slides.native` it is simplejpeg and cv2 plus microseconds."""
    monkeypatch.setattr(decoding, "_native_decode", None)
    data = encode_tile(picture(256, 256), 90)

    def bare() -> NDArray[np.uint8]:
        return cv2.resize(simplejpeg.decode_jpeg(data, "RGB", min_height=128, min_width=128), (120, 120))

    np.testing.assert_array_equal(decode_tile(data, 120), bare())
    assert ratio_in_turns(lambda: decode_tile(data, 120), bare, times=600) < 1.25
