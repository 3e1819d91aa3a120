from __future__ import annotations

import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from slides.errors import SlideFileError
from slides.reader import open_slide
from slides.tiff import TiffPixels, jpeg_overview


def picture(height_px: int = 500, width_px: int = 700, channels: int = 3) -> NDArray[np.uint8]:
    y, x = np.mgrid[:height_px, :width_px]
    waves = [127 + 100 * np.sin(x / (29 + 2 * k) + k) * np.cos(y / (31 - k)) for k in range(channels)]
    return np.stack(waves, axis=2).astype(np.uint8)


def write(path: Path, image: NDArray[np.generic], **options: object) -> Path:
    defaults: dict[str, object] = {"photometric": "rgb", "rowsperstrip": 37}
    resolution = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, image, **(defaults | resolution | options))
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zlib"},
        {"compression": "zlib", "predictor": True},
        {"compression": "lzw"},
        {"compression": "none"},
        {"compression": "none", "rowsperstrip": 500},
        {"compression": "none", "byteorder": ">"},
        {"compression": "packbits"},
        {"compression": "zlib", "bigtiff": True, "byteorder": ">"},
    ],
    ids=str,
)
def test_striped_tiffs_are_read_exactly(tmp_path: Path, options: dict[str, object]) -> None:
    image_HWC = picture()
    with open_slide(write(tmp_path / "slide.tif", image_HWC, **options)) as slide:
        assert isinstance(slide._pixels, TiffPixels)
        assert slide.size_px == (700, 500)
        assert slide.um_per_px == pytest.approx(0.5)
        np.testing.assert_array_equal(slide.read_region_um(101, 52, 300, 0.5), image_HWC[52:352, 101:401])
        np.testing.assert_array_equal(slide.thumbnail(700), image_HWC)
        corner_HWC = slide.read_region_um(650, 450, 100, 0.5)
        np.testing.assert_array_equal(corner_HWC[:50, :50], image_HWC[450:, 650:])
        assert (corner_HWC[50:] == 255).all()
        assert (corner_HWC[:, 50:] == 255).all()


def test_sixteen_bits_keep_their_high_byte(tmp_path: Path) -> None:
    image_HWC = np.random.default_rng(0).integers(0, 65536, (200, 300, 3), dtype=np.uint16)
    for compression in ("zlib", "none"):
        for byteorder in "<>":
            path = write(tmp_path / "slide.tif", image_HWC, compression=compression, byteorder=byteorder)
            with open_slide(path) as slide:
                np.testing.assert_array_equal(slide.thumbnail(300), image_HWC >> 8)


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_grey(tmp_path: Path, photometric: str) -> None:
    grey_HW = picture(channels=1)[:, :, 0]
    with open_slide(
        write(tmp_path / "slide.tif", grey_HW, photometric=photometric, compression="zlib")
    ) as slide:
        expected_HW = grey_HW if photometric == "minisblack" else 255 - grey_HW
        np.testing.assert_array_equal(slide.thumbnail(700), np.repeat(expected_HW[:, :, None], 3, axis=2))


@pytest.mark.parametrize(("kind", "half"), [("unassalpha", (127, 127, 127)), ("assocalpha", (127, 127, 127))])
def test_alpha_is_composited_on_white(tmp_path: Path, kind: str, half: tuple[int, int, int]) -> None:
    rgba_HWC = np.dstack([picture(), np.full((500, 700), 255, np.uint8)])
    rgba_HWC[:100] = 0
    rgba_HWC[100:200] = (0, 0, 0, 128)
    path = write(tmp_path / "slide.tif", rgba_HWC, extrasamples=[kind], compression="zlib")
    with open_slide(path) as slide:
        image_HWC = slide.thumbnail(700)
    assert (image_HWC[:100] == 255).all()
    assert (image_HWC[100:200] == half).all()
    np.testing.assert_array_equal(image_HWC[200:], rgba_HWC[200:, :, :3])


def test_striped_jpeg(tmp_path: Path) -> None:
    image_HWC = picture()
    path = write(tmp_path / "slide.tif", image_HWC, compression="jpeg", rowsperstrip=48)
    with open_slide(path) as slide:
        assert isinstance(slide._pixels, TiffPixels)
        assert np.abs(slide.thumbnail(700).astype(int) - image_HWC).mean() < 3


def test_tiled_deflate_and_tiled_sixteen_bit_are_read_by_whoever_can(tmp_path: Path) -> None:
    image_HWC = picture()
    path = write(tmp_path / "slide.tif", image_HWC, compression="zlib", tile=(64, 64), rowsperstrip=None)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.thumbnail(700), image_HWC)
    wide_HWC = image_HWC.astype(np.uint16) * 256
    path = write(tmp_path / "wide.tif", wide_HWC, compression="zlib", tile=(64, 64), rowsperstrip=None)
    with open_slide(path) as slide:
        assert np.abs(slide.thumbnail(700).astype(int) - image_HWC).max() <= 1


def test_reduced_copies_are_used(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    image_HWC = picture(512, 512)
    with tifffile.TiffWriter(path) as writer:
        options = {"photometric": "rgb", "compression": "zlib", "rowsperstrip": 64}
        writer.write(
            image_HWC, subifds=1, resolution=(20_000, 20_000), resolutionunit="CENTIMETER", **options
        )
        writer.write(np.full((128, 128, 3), 77, np.uint8), subfiletype=1, **options)
    with open_slide(path) as slide:
        assert slide.level_count == 2
        assert (slide.thumbnail(128) == 77).all()
        np.testing.assert_array_equal(slide.thumbnail(512), image_HWC)


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.zeros((64, 64, 3), np.float32), {"photometric": "rgb"}, "bit samples"),
        (np.zeros((3, 64, 64), np.uint8), {"photometric": "rgb", "planarconfig": "separate"}, "stored apart"),
        (np.zeros((64, 64, 4), np.uint8), {"photometric": "separated"}, "SEPARATED"),
        (
            np.zeros((64, 64), np.uint8),
            {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)},
            "PALETTE",
        ),
    ],
)
def test_what_is_not_supported_says_how_to_convert_it(
    tmp_path: Path, image: NDArray[np.generic], options: dict[str, object], message: str
) -> None:
    with pytest.raises(SlideFileError, match=rf"{message}.*vips tiffsave"):
        open_slide(write(tmp_path / "slide.tif", image, rowsperstrip=16, compression="zlib", **options))


def test_one_huge_compressed_strip_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = write(tmp_path / "slide.tif", picture(64, 64), compression="zlib", rowsperstrip=64)
    with tifffile.TiffFile(path, mode="r+b") as file:
        for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tag = file.pages.first.tags[name]
            tag.overwrite(60_000)
    tracemalloc.start()
    try:
        with pytest.raises(SlideFileError, match=r"compressed in pieces of \d+ MiB.*vips tiffsave"):
            open_slide(path)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000  # decoded, the strip would have 10.8 GB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("share", [0.3, 0.95])
def test_truncated(tmp_path: Path, share: float) -> None:
    data = write(tmp_path / "whole.tif", picture(), compression="zlib").read_bytes()
    path = tmp_path / "cut.tif"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SlideFileError, match="truncated"):
        open_slide(path)


def test_damaged_strip(tmp_path: Path) -> None:
    path = write(tmp_path / "slide.tif", picture(), compression="zlib")
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages.first.dataoffsets[3], file.pages.first.databytecounts[3]
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = bytes(count)
    path.write_bytes(data)
    with open_slide(path) as slide, pytest.raises(SlideFileError, match="pixels cannot be read"):
        slide.thumbnail(100)


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_overview_in_the_dct_domain_is_the_reduced_image(tmp_path: Path, photometric: str) -> None:
    """Also for JPEG whose components are RGB: no marker in the tiles says so, the TIFF does."""
    image_HWC = picture(1000, 1300)
    path = tmp_path / "slide.tif"
    tiling = {"tile": (128, 128), "rowsperstrip": None, "compression": "jpeg"}
    arguments = {"level": 95} | ({"outcolorspace": "rgb"} if photometric == "rgb" else {})
    write(path, image_HWC, photometric="rgb", compressionargs=arguments, **tiling)
    with tifffile.TiffFile(path) as file:
        assert file.pages.first.photometric.name.lower() == photometric
    overview_HWC = jpeg_overview(path, (1300, 1000), (130, 100))
    assert overview_HWC is not None
    expected_HWC = cv2.resize(image_HWC, (130, 100), interpolation=cv2.INTER_AREA)
    assert np.abs(overview_HWC.astype(int) - expected_HWC).mean() < 3


def test_no_overview_where_there_is_no_shortcut(tmp_path: Path) -> None:
    path = write(tmp_path / "slide.tif", picture(), compression="zlib")
    assert jpeg_overview(path, (700, 500), (70, 50)) is None
    (tmp_path / "text.tif").write_text("no TIFF")
    assert jpeg_overview(tmp_path / "text.tif", (700, 500), (70, 50)) is None


def test_memory_of_a_large_striped_deflate_tiff_is_bounded(tmp_path: Path) -> None:
    """20,000 x 20,000 px are 1.2 GB decoded; the thumbnail of them needs a fraction of that."""
    path = tmp_path / "slide.tif"
    light, dark = (zlib.compress(bytes([value]) * (100 * 20_000 * 3), 1) for value in (240, 90))
    layout = {"shape": (20_000, 20_000, 3), "dtype": np.uint8, "rowsperstrip": 100, "compression": "zlib"}
    tifffile.imwrite(path, (light if i % 3 else dark for i in range(200)), photometric="rgb", **layout)
    code = f"""
import re
from slides import open_slide
with open_slide({str(path)!r}) as slide:
    mean = slide.thumbnail(500).mean()
assert abs(mean - (240 * 2 + 90) / 3) < 2, mean
# Not ru_maxrss: that counts the memory of the process that forked this one, too.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 700
