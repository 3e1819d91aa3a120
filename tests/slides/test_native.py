"""The compiled fast path gives libjpeg-turbo's pixels to the bit, and leaves to it whatever is not plain."""

from __future__ import annotations

import _ctypes
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from slides import decode as decoding
from slides import native
from slides.decode import decode_tile, encode_tile, jpeg_decoder
from slides.errors import TileDecodeError
from slides.native import building
from tests.slides.test_decode import ratio_in_turns
from training.benchmarks.blood_cells import BCCD_DIR

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
FACTORS = (1, 2, 4, 8)
SIZES_PX = ((64, 64), (8, 8), (1, 1), (33, 47), (80, 24), (129, 16))


@pytest.fixture(scope="module")
def decode() -> native.Decode:
    found = native.load()
    assert found is not None, "not compiled: python -m slides.native"
    return found


def picture(height_px: int, width_px: int, seed: int = 3) -> NDArray[np.uint8]:
    y, x = np.mgrid[:height_px, :width_px]
    waves = np.stack([127 + 100 * np.sin(x / (3 + k) + k) * np.cos(y / (5 - k)) for k in range(3)], axis=2)
    noise = np.random.default_rng(seed).normal(0, 20, waves.shape)
    return np.clip(waves + noise, 0, 255).astype(np.uint8)


def saved(image_HWC: NDArray[np.uint8], **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image_HWC).save(stream, "JPEG", **options)
    return stream.getvalue()


def library(data: bytes, height_px: int, width_px: int, factor: int) -> NDArray[np.uint8]:
    return simplejpeg.decode_jpeg(
        data, "RGB", min_height=-(-height_px // factor), min_width=-(-width_px // factor)
    )


def assert_same(decode: native.Decode, data: bytes, factor: int) -> None:
    height_px, width_px = simplejpeg.decode_jpeg_header(data)[:2]
    got_HWC = decode(data, width_px, height_px, factor)
    assert got_HWC is not None
    np.testing.assert_array_equal(got_HWC, library(data, height_px, width_px, factor))


@pytest.mark.parametrize("size_px", SIZES_PX, ids=str)
@pytest.mark.parametrize("quality", [10, 60, 90, 100])
@pytest.mark.parametrize("optimize", [False, True])
def test_every_pixel_is_the_librarys(
    decode: native.Decode, size_px: tuple[int, int], quality: int, optimize: bool
) -> None:
    image_HWC = picture(*size_px)
    for factor in FACTORS:
        assert_same(decode, saved(image_HWC, quality=quality, subsampling=0, optimize=optimize), factor)
        assert_same(decode, saved(image_HWC[:, :, 0], quality=quality, optimize=optimize), factor)
        if factor > 1:  # chroma is as large as luma then
            assert_same(decode, saved(image_HWC, quality=quality, subsampling=2, optimize=optimize), factor)


@pytest.mark.parametrize("value", [0, 1, 127, 128, 254, 255])
def test_flat_tiles_are_flat(decode: native.Decode, value: int) -> None:
    for factor in FACTORS:
        assert_same(decode, encode_tile(np.full((40, 40, 3), value, np.uint8), 90), factor)


def test_the_extremes_of_noise(decode: native.Decode) -> None:
    rng = np.random.default_rng(1)
    for quality in (1, 50, 100):
        data = encode_tile(rng.choice(np.array([0, 255], np.uint8), (72, 72, 3)), quality)
        for factor in FACTORS:
            assert_same(decode, data, factor)


@pytest.mark.skipif(not BCCD_DIR.is_dir(), reason="the BCCD photographs are not there")
def test_photographs(decode: native.Decode) -> None:
    photographs = sorted(BCCD_DIR.rglob("*.jpg"))[:40]
    assert photographs
    taken = 0
    for path in photographs:
        data = path.read_bytes()
        height_px, width_px = simplejpeg.decode_jpeg_header(data)[:2]
        for factor in FACTORS:
            got_HWC = decode(data, width_px, height_px, factor)
            if got_HWC is not None:
                taken += 1
                np.testing.assert_array_equal(got_HWC, library(data, height_px, width_px, factor))
        again = encode_tile(np.asarray(Image.open(path).convert("RGB")), 90)
        assert_same(decode, again, 2)
    assert taken > len(photographs)


def unusual() -> dict[str, bytes]:
    """Good files, all of them, that are not plain."""
    image_HWC = picture(64, 64)
    plain = saved(image_HWC, quality=85, subsampling=0)
    end = plain.rindex(b"\xff\xd9")
    quant = plain.index(b"\xff\xdb")
    return {
        "progressive": saved(image_HWC, progressive=True),
        "restarts": saved(image_HWC, restart_marker_rows=1),
        "RGB": saved(image_HWC, keep_rgb=True),
        "4:2:2": saved(image_HWC, subsampling=1),
        "bytes before the end": plain[:end] + b"\0\0" + plain[end:],
        "16-bit quantisation": plain[:quant] + sixteen_bit(plain, quant),
    }


def sixteen_bit(data: bytes, at: int) -> bytes:
    length = int.from_bytes(data[at + 2 : at + 4], "big")
    table = data[at + 5 : at + 69]
    wide = b"".join(bytes([0, value]) for value in table)
    rest = (
        data[at + 2 + length :]
        if length == 67
        else b"\xff\xdb" + (length - 65).to_bytes(2, "big") + data[at + 69 :]
    )
    return b"\xff\xdb" + (131).to_bytes(2, "big") + bytes([0x10 | data[at + 4]]) + wide + rest


@pytest.mark.parametrize("kind", list(unusual()))
def test_what_is_not_plain_is_left_to_the_library(decode: native.Decode, kind: str) -> None:
    assert decode(unusual()[kind], 64, 64, 1) is None


def test_enlarged_chroma_is_left_to_the_library(decode: native.Decode) -> None:
    assert decode(saved(picture(64, 64), subsampling=2), 64, 64, 1) is None


def test_another_size_than_was_read_is_declined(decode: native.Decode) -> None:
    data = encode_tile(picture(64, 64), 90)
    assert decode(data, 64, 63, 1) is None
    assert decode(data, 32, 64, 1) is None


def test_what_stands_beside_the_picture_does_not_matter(decode: native.Decode) -> None:
    data = saved(
        picture(64, 64), quality=80, subsampling=0, comment=b"\xff\xd9\xff\xda", icc_profile=b"p" * 70000
    )
    assert_same(decode, data, 2)
    assert_same(decode, data + b"behind the end", 2)


def test_every_cut_is_declined(decode: native.Decode) -> None:
    data = encode_tile(picture(24, 24), 80)
    assert all(decode(data[:length], 24, 24, 1) is None for length in range(len(data)))


def test_whatever_it_takes_of_damaged_files_is_what_the_library_gives(decode: native.Decode) -> None:
    """Bytes changed at random: it never takes a file that the library refuses, and its pixels are the library's."""
    rng = np.random.default_rng(11)
    good = [
        saved(picture(height_px, width_px), quality=quality, subsampling=subsampling, optimize=optimize)
        for height_px, width_px in ((48, 48), (33, 47))
        for quality in (40, 95)
        for subsampling in (0, 2)
        for optimize in (False, True)
    ]
    taken = 0
    for number in range(20_000):
        data = bytearray(good[number % len(good)])
        first = 2 if number % 2 else data.index(b"\xff\xda")
        for place in rng.integers(first, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(256)
        bad = bytes(data[: rng.integers(4, len(data))] if number % 7 == 0 else data)
        try:
            height_px, width_px = simplejpeg.decode_jpeg_header(bad)[:2]
        except ValueError:
            continue
        factor = FACTORS[int(rng.integers(4))]
        got_HWC = decode(bad, width_px, height_px, factor) if height_px * width_px < 1e6 else None
        if got_HWC is not None:
            taken += 1
            np.testing.assert_array_equal(got_HWC, library(bad, height_px, width_px, factor))
    assert taken > 1000


def test_threads_share_it(decode: native.Decode) -> None:
    data = [encode_tile(picture(96, 96, seed), 90) for seed in range(4)]
    wanted = [library(one, 96, 96, 2) for one in data]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda number: decode(data[number % 4], 96, 96, 2), range(200)))
    for number, got_HWC in enumerate(found):
        np.testing.assert_array_equal(got_HWC, wanted[number % 4])


def test_tiles_are_the_same_with_and_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jpeg_decoder() == "slides.native"
    files = [*unusual().values(), saved(picture(64, 64), subsampling=2), encode_tile(picture(200, 150), 90)]
    with_it = [decode_tile(data, size_px) for data in files for size_px in (64, 32, 20)]
    monkeypatch.setattr(decoding, "_native_decode", None)
    assert jpeg_decoder() == "libjpeg-turbo"
    without = [decode_tile(data, size_px) for data in files for size_px in (64, 32, 20)]
    for ours_HWC, theirs_HWC in zip(with_it, without, strict=True):
        np.testing.assert_array_equal(ours_HWC, theirs_HWC)


def test_a_damaged_tile_has_the_same_error_with_and_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def error_of(bad: bytes) -> tuple[str, str]:
        with pytest.raises(TileDecodeError) as caught:
            decode_tile(bad, 32)
        return caught.value.reason, str(caught.value)

    data = encode_tile(picture(64, 64), 90)
    damaged = [data[: len(data) // 2], data[:-2], data[:400] + b"\xff" * 40 + data[440:]]
    with_it = [error_of(bad) for bad in damaged]
    monkeypatch.setattr(decoding, "_native_decode", None)
    assert [error_of(bad) for bad in damaged] == with_it


def test_it_is_faster_than_the_library(decode: native.Decode) -> None:
    """Seen: 0.68."""
    data = encode_tile(picture(256, 256), 90)
    ratio = ratio_in_turns(lambda: decode(data, 256, 256, 2), lambda: library(data, 256, 256, 2), times=300)
    assert ratio < 0.9


def loaded_with(**environment: str) -> str:
    code = "from slides.decode import jpeg_decoder; print(jpeg_decoder())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_it_can_be_switched_off() -> None:
    assert loaded_with() == "slides.native"
    assert loaded_with(CLOTLINE_NATIVE_JPEG="off") == "libjpeg-turbo"


def test_a_library_of_another_source_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = native.library_path()
    assert native.load_from(path) is not None
    monkeypatch.setattr(native, "source_sha256", lambda: "0" * 64)
    assert native.load_from(path) is None
    broken = tmp_path / "broken.so"
    monkeypatch.setattr(native, "library_path", lambda: broken)
    for content in (b"", b"no library", Path(_ctypes.__file__).read_bytes()):
        broken.write_bytes(content)
        assert native.load() is None


def test_an_old_processor_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native.TARGETS, os.uname().machine, ("", "", {"no_such_flag"}))
    assert native.why_not() == "the processor has no no_such_flag"
    assert native.load() is None
    with pytest.raises(building.NativeBuildError, match="no_such_flag"):
        building.build()


def test_what_does_not_compile_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "library_path", lambda: tmp_path / "made.so")
    monkeypatch.setattr(building, "OPTIONS", (*building.OPTIONS, "-DOK=nonsense("))
    with pytest.raises(building.NativeBuildError, match="was not compiled"):
        building.build()
    assert not list(tmp_path.iterdir())


def test_it_is_compiled_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_a_space = tmp_path / "a b"
    with_a_space.mkdir()
    monkeypatch.setattr(building, "library_path", lambda: with_a_space / "made.so")
    assert building.build() == with_a_space / "made.so"
    assert [path.name for path in with_a_space.iterdir()] == ["made.so"]
    monkeypatch.setattr(building, "agrees", lambda decode: False)
    with pytest.raises(building.NativeBuildError, match="other pixels"):
        building.build()


def test_a_decoder_that_gives_other_pixels_does_not_agree(decode: native.Decode) -> None:
    assert building.agrees(decode)
    assert not building.agrees(lambda data, width_px, height_px, factor: None)

    def off_by_one(data: bytes, width_px: int, height_px: int, factor: int) -> NDArray[np.uint8] | None:
        got_HWC = decode(data, width_px, height_px, factor)
        return None if got_HWC is None else got_HWC ^ np.uint8(1)

    assert not building.agrees(off_by_one)
