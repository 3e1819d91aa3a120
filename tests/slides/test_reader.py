from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from slides.errors import ResolutionUnknownError, SlideFileError
from slides.reader import OpenslidePixels, open_slide


def test_size_resolution_and_levels(demo_slide: Path) -> None:
    with open_slide(str(demo_slide)) as slide:
        assert slide.size_px == (2048, 1536)
        assert slide.um_per_px == pytest.approx(0.5)
        assert slide.level_count == 2
        assert slide.path == demo_slide
        assert isinstance(slide._pixels, OpenslidePixels)


def test_a_region_at_full_resolution_is_what_openslide_reads(demo_slide: Path) -> None:
    with open_slide(demo_slide) as slide, openslide.OpenSlide(demo_slide) as bare:
        region_HWC = slide.read_region_um(301, 203, 256, 0.5)
        expected_HWC = np.asarray(bare.read_region((301, 203), 0, (256, 256)).convert("RGB"))
    np.testing.assert_array_equal(region_HWC, expected_HWC)
    assert region_HWC.flags.c_contiguous


def test_a_coarser_region_comes_from_the_coarsest_level_that_is_fine_enough(demo_slide: Path) -> None:
    with open_slide(demo_slide) as slide, openslide.OpenSlide(demo_slide) as bare:
        np.testing.assert_array_equal(
            slide.read_region_um(512, 256, 128, 2.0),
            np.asarray(bare.read_region((512, 256), 1, (128, 128)).convert("RGB")),
        )
        full_HWC = np.asarray(bare.read_region((512, 256), 0, (256, 256)).convert("RGB"))
        np.testing.assert_array_equal(
            slide.read_region_um(512, 256, 128, 1.0),
            cv2.resize(full_HWC, (128, 128), interpolation=cv2.INTER_AREA),
        )


def test_a_region_read_in_blocks_is_the_region_read_at_once(
    demo_slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_slide(demo_slide) as slide:
        at_once_HWC = slide.read_region_um(-100, -60, 700, 1.25)
        monkeypatch.setattr("slides.reader.BLOCK_PIXELS", 10_000)
        slide._pixels.block_px = (250, 250)
        in_blocks_HWC = slide.read_region_um(-100, -60, 700, 1.25)
    assert np.abs(at_once_HWC.astype(int) - in_blocks_HWC).mean() < 4
    assert cv2.blur(cv2.absdiff(at_once_HWC, in_blocks_HWC), (25, 25)).max() < 25


def test_outside_of_the_slide_is_white(demo_slide: Path) -> None:
    with open_slide(demo_slide) as slide:
        corner_HWC = slide.read_region_um(-64, -64, 128, 0.5)
        assert (corner_HWC[:64] == 255).all()
        assert (corner_HWC[:, :64] == 255).all()
        assert not (corner_HWC[64:, 64:] == 255).all()
        assert (slide.read_region_um(5000, 5000, 64, 0.5) == 255).all()


def test_thumbnail_keeps_the_shape_and_never_enlarges(demo_slide: Path) -> None:
    with open_slide(demo_slide) as slide:
        thumbnail_HWC = slide.thumbnail(200)
        assert thumbnail_HWC.shape == (150, 200, 3)
        whole_HWC = slide.thumbnail(99_999)
        assert whole_HWC.shape == (1536, 2048, 3)
        reduced_HWC = cv2.resize(whole_HWC, (200, 150), interpolation=cv2.INTER_AREA)
        assert np.abs(thumbnail_HWC.astype(int) - reduced_HWC).mean() < 3
        assert slide.thumbnail(1).shape == (1, 1, 3)
        with pytest.raises(ValueError, match="max_side_px"):
            slide.thumbnail(0)


def test_threads_read_the_same(demo_slide: Path) -> None:
    corners = [(x, y) for x in range(0, 1800, 150) for y in range(0, 1400, 150)]
    with open_slide(demo_slide) as slide:
        one_by_one = [slide.read_region_um(x, y, 128, 0.5) for x, y in corners]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda corner: slide.read_region_um(*corner, 128, 0.5), corners))
    np.testing.assert_array_equal(one_by_one, together)


def test_missing_folder_and_zero_bytes(tmp_path: Path) -> None:
    with pytest.raises(SlideFileError, match="there is no such slide"):
        open_slide(tmp_path / "missing.tif")
    with pytest.raises(SlideFileError, match="cannot be read: Is a directory"):
        open_slide(tmp_path)
    (tmp_path / "empty.tif").touch()
    with pytest.raises(SlideFileError, match="zero bytes"):
        open_slide(tmp_path / "empty.tif")


@pytest.mark.parametrize(
    "data", [b"hello", b"II*\0", b"II*\0\x08\0\0\0", b"MM\0+" + bytes(500), bytes(10_000)]
)
def test_not_an_image(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "slide.tif"
    path.write_bytes(data)
    with pytest.raises(SlideFileError, match=r"slide\.tif"):
        open_slide(path)


def test_a_photograph_is_no_slide(tmp_path: Path) -> None:
    for name in ("slide.jpg", "slide.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
        with pytest.raises(SlideFileError, match="JPEG or PNG image, not a slide"):
            open_slide(tmp_path / name)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_truncated(demo_slide: Path, tmp_path: Path, share: float) -> None:
    data = demo_slide.read_bytes()
    path = tmp_path / "cut.tif"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SlideFileError, match="truncated"):
        open_slide(path)


def test_damaged_pixels_are_an_error_of_ours(demo_slide: Path, tmp_path: Path) -> None:
    with tifffile.TiffFile(demo_slide) as file:
        offset, count = file.pages.first.dataoffsets[9], file.pages.first.databytecounts[9]
    data = bytearray(demo_slide.read_bytes())
    data[offset : offset + count] = bytes(count)
    path = tmp_path / "damaged.tif"
    path.write_bytes(data)
    with (
        open_slide(path) as slide,
        pytest.raises(SlideFileError, match=r"damaged\.tif: pixels cannot be read"),
    ):
        slide.read_region_um(1 * 256, 1 * 256, 256, 0.5)


@pytest.mark.parametrize("resolution", [None, (72, 72), (300, 300)])
def test_resolution_of_a_printer_or_none_is_unknown(
    tmp_path: Path, resolution: tuple[int, int] | None
) -> None:
    path = tmp_path / "slide.tif"
    options = {"resolution": resolution, "resolutionunit": "INCH"} if resolution else {}
    tifffile.imwrite(path, np.zeros((256, 256, 3), np.uint8), photometric="rgb", tile=(64, 64), **options)
    with open_slide(path) as slide:
        assert slide.um_per_px is None
        with pytest.raises(ResolutionUnknownError, match="--um-per-px"):
            slide.read_region_um(0, 0, 64, 0.5)
        assert slide.thumbnail(64).shape == (64, 64, 3)
    with open_slide(path, um_per_px=0.25) as slide:
        assert slide.um_per_px == 0.25
        assert slide.read_region_um(0, 0, 64, 0.5).shape == (64, 64, 3)
    for wrong in (0, -1, float("nan")):
        with pytest.raises(SlideFileError, match="um_per_px must be"):
            open_slide(path, um_per_px=wrong)


@pytest.mark.timeout(170)
def test_ten_gigapixels_in_one_level_stay_below_a_gigabyte_and_a_half(huge_slide: Path) -> None:
    code = f"""
import re
from slides import ModelSpec, open_slide, iter_tiles
spec = ModelSpec(class_names=("a", "b"), tile_size_px=256, um_per_px=0.5, input_size_px=128,
                 tiles_per_slide=8, min_tissue_share=0.9)
with open_slide({str(huge_slide)!r}) as slide:
    assert slide.size_px == (100_000, 100_000) and slide.level_count == 1
    tiles = list(iter_tiles(slide, spec))
assert len(tiles) == 8 and all(len(data) > 10_000 for _, data in tiles), "tissue is noisy, so its JPEG is long"
# Not ru_maxrss: that counts the memory of the process that forked this one, too.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 50 < int(done.stdout) < 1500


def test_the_level_that_is_read_for_a_resolution(demo_slide: Path) -> None:
    with open_slide(demo_slide) as slide:
        assert [slide.level_for_um(um_per_px) for um_per_px in (0.1, 0.5, 1.99, 2.0, 50.0)] == [0, 0, 0, 1, 1]
