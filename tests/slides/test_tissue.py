from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from slides import demo, demo_render
from slides.decode import decode_tile
from slides.errors import NoTissueError, ResolutionUnknownError
from slides.reader import open_slide
from slides.spec import ModelSpec
from slides.tissue import (
    TileRef,
    candidate_tiles,
    cut_tiles,
    darkest,
    find_tiles,
    iter_tiles,
    tissue_mask,
)

GLASS = (240, 238, 241)
PINK = (205, 100, 140)


def glass(
    height_px: int = 200, width_px: int = 300, colour: tuple[int, int, int] = GLASS
) -> NDArray[np.uint8]:
    noise_HWC = np.random.default_rng(0).normal(0, 1.5, (height_px, width_px, 3))
    return np.clip(np.array(colour) + noise_HWC, 0, 255).astype(np.uint8)


def write(path: Path, image_HWC: NDArray[np.uint8], um_per_px: float | None = 0.5) -> Path:
    options: dict[str, object] = {}
    if um_per_px:
        options = {"resolution": (10_000 / um_per_px,) * 2, "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, image_HWC, photometric="rgb", tile=(64, 64), compression="zlib", **options)
    return path


@pytest.mark.parametrize(
    "colour", [PINK, (150, 40, 60), (120, 70, 150), (225, 190, 210), (190, 60, 50), (230, 200, 110)], ids=str
)
def test_stained_tissue_is_found_to_the_pixel_or_two(colour: tuple[int, int, int]) -> None:
    image_HWC = glass()
    cv2.circle(image_HWC, (150, 100), 60, colour, -1)
    wanted_HW = np.zeros((200, 300), np.uint8)
    cv2.circle(wanted_HW, (150, 100), 60, 1, -1)
    mask_HW = tissue_mask(image_HWC)
    assert mask_HW.dtype == np.bool_
    assert mask_HW.shape == (200, 300)
    assert (mask_HW & (wanted_HW > 0)).sum() / (mask_HW | (wanted_HW > 0)).sum() > 0.94


@pytest.mark.parametrize(
    "colour", [GLASS, (255, 255, 255), (225, 232, 225), (250, 240, 235), (10, 10, 10)], ids=str
)
def test_empty_glass_of_any_tint_has_no_tissue(colour: tuple[int, int, int]) -> None:
    assert not tissue_mask(glass(colour=colour)).any()


@pytest.mark.parametrize("ink", [(25, 25, 28), (35, 60, 160), (30, 130, 80), (90, 90, 95)], ids=str)
def test_ink_and_dark_edges_are_no_tissue(ink: tuple[int, int, int]) -> None:
    image_HWC = glass()
    cv2.polylines(image_HWC, [np.array([[20, 20], [150, 60], [280, 30]])], False, ink, 9, cv2.LINE_AA)
    image_HWC[-25:] = image_HWC[-25:] // 4
    image_HWC[:, :15] = image_HWC[:, :15] // 2
    assert not tissue_mask(cv2.GaussianBlur(image_HWC, (5, 5), 0)).any()


def test_dust_is_no_tissue() -> None:
    image_HWC = glass()
    for k in range(60):
        cv2.circle(image_HWC, (7 + 37 * k % 290, 5 + 23 * k % 190), k % 4, (130, 100, 80), -1)
    assert not tissue_mask(image_HWC).any()


def test_ink_over_tissue_is_cut_out() -> None:
    image_HWC = glass()
    cv2.circle(image_HWC, (150, 100), 80, PINK, -1)
    stroke_HW = np.zeros((200, 300), np.uint8)
    cv2.line(stroke_HW, (80, 90), (220, 110), 1, 12)
    for ink in ((28, 26, 30), (40, 70, 170), (40, 140, 85)):
        inked_HWC = image_HWC.copy()
        inked_HWC[stroke_HW > 0] = (inked_HWC[stroke_HW > 0] * (np.array(ink) / 255)).astype(np.uint8)
        mask_HW = tissue_mask(inked_HWC)
        assert mask_HW[stroke_HW > 0].mean() < 0.1
        assert mask_HW.mean() > 0.7 * tissue_mask(image_HWC).mean()


def test_demo_slides_against_what_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """At mask resolution: nearly all tissue, nearly no ink on glass, no dust. Drawn = known exactly."""
    drawn: dict[str, NDArray[np.bool_]] = {}
    fields, draw_ink = demo_render._fields, demo_render._draw_ink

    def remember_fields(look, rng):  # type: ignore[no-untyped-def]
        answer = fields(look, rng)
        drawn["tissue"] = answer[0] > 40
        return answer

    def remember_ink(image_HWC, islands, rng):  # type: ignore[no-untyped-def]
        before_HWC = image_HWC.copy()
        draw_ink(image_HWC, islands, rng)
        drawn["ink"] = cv2.absdiff(before_HWC, image_HWC).max(axis=2) > 25

    monkeypatch.setattr(demo_render, "_fields", remember_fields)
    monkeypatch.setattr(demo_render, "_draw_ink", remember_ink)
    counts = np.zeros(4)
    for plan in demo._plan(8, 8, 2, 5, (2560, 2048)):
        image_HWC = demo_render.render_slide(plan.look, np.random.default_rng(plan.seed))
        size_px = (160, 128)

        def share(field: NDArray[np.bool_], size_px: tuple[int, int] = size_px) -> NDArray[np.float32]:
            return np.asarray(cv2.resize(field.astype(np.float32), size_px, interpolation=cv2.INTER_AREA))

        mask_HW = tissue_mask(
            np.asarray(cv2.resize(image_HWC, size_px, interpolation=cv2.INTER_AREA), np.uint8)
        )
        tissue_HW, ink_HW = share(drawn["tissue"]), share(drawn["ink"])
        clean_HW = (tissue_HW > 0.6) & (ink_HW == 0)
        inked_HW = (tissue_HW == 0) & (ink_HW > 0.6)
        counts += clean_HW.sum(), mask_HW[clean_HW].sum(), inked_HW.sum(), mask_HW[inked_HW].sum()
        assert mask_HW[(tissue_HW == 0) & (ink_HW == 0)].mean() < 0.01, "glass, dust and dark edges"
    clean, found, inked, mistaken = counts
    assert found / clean > 0.98
    assert inked > 100
    assert mistaken / inked < 0.02


def test_tiles_lie_on_a_grid_and_the_richest_come_first(demo_slide: Path, spec: ModelSpec) -> None:
    with open_slide(demo_slide) as slide:
        tiles = find_tiles(slide, spec)
        assert find_tiles(slide, spec) == tiles, "the same every time"
    assert len(tiles) == spec.tiles_per_slide
    assert all(tile.side_px == 128 and tile.x_px % 128 == 0 and tile.y_px % 128 == 0 for tile in tiles)
    assert all(tile.x_px + 128 <= 2048 and tile.y_px + 128 <= 1536 for tile in tiles)
    assert len({(tile.x_px, tile.y_px) for tile in tiles}) == len(tiles)
    assert tiles == sorted(tiles, key=lambda tile: (-tile.tissue_share, tile.y_px, tile.x_px))


def test_shares_are_areas_and_poor_tiles_are_never_taken(tmp_path: Path, spec: ModelSpec) -> None:
    image_HWC = glass(256, 512)
    image_HWC[:, 160:352] = PINK  # columns of tiles: none, 3/4, 3/4, none
    with open_slide(write(tmp_path / "slide.tif", image_HWC)) as slide:
        tiles = find_tiles(slide, spec)
    assert [(tile.x_px, tile.y_px) for tile in tiles] == [(128, 0), (256, 0), (128, 128), (256, 128)]
    assert all(abs(tile.tissue_share - 0.75) < 0.02 for tile in tiles)


def test_equally_rich_tiles_are_taken_from_all_over_the_slide(tmp_path: Path, spec: ModelSpec) -> None:
    image_HWC = glass(1280, 1280)
    image_HWC[64:] = PINK
    with open_slide(write(tmp_path / "slide.tif", image_HWC)) as slide:
        tiles = find_tiles(slide, spec)
    assert all(tile.tissue_share == 1 for tile in tiles)
    assert min(tile.y_px for tile in tiles) < 400
    assert max(tile.y_px for tile in tiles) > 900


def test_tile_side_follows_the_resolution_of_the_slide(tmp_path: Path, spec: ModelSpec) -> None:
    image_HWC = glass(512, 512)
    image_HWC[:] = PINK
    with open_slide(write(tmp_path / "slide.tif", image_HWC, um_per_px=0.25)) as slide:
        tiles = find_tiles(slide, spec)
        cut = dict(iter_tiles(slide, spec, tiles))
    assert {tile.side_px for tile in tiles} == {256}
    assert len(tiles) == 4
    assert {decode_tile(data, 128).shape for data in cut.values()} == {(128, 128, 3)}


def test_a_slide_smaller_than_a_tile_gives_one(tmp_path: Path, spec: ModelSpec) -> None:
    image_HWC = glass(100, 100)
    image_HWC[:] = PINK
    with open_slide(write(tmp_path / "slide.tif", image_HWC)) as slide:
        [(tile, data)] = iter_tiles(slide, spec)
    assert tile.tissue_share == pytest.approx((100 / 128) ** 2, abs=0.01)
    assert (decode_tile(data, 128)[110:, 110:] > 250).all()


def test_all_glass(tmp_path: Path, spec: ModelSpec) -> None:
    with open_slide(write(tmp_path / "glass.tif", glass(1000, 1000))) as slide:
        with pytest.raises(NoTissueError, match=r"glass\.tif: no tissue; .*49 tiles.*inspect"):
            find_tiles(slide, spec)
        with pytest.raises(NoTissueError):
            next(iter_tiles(slide, spec))


def test_unknown_resolution(tmp_path: Path, spec: ModelSpec) -> None:
    path = write(tmp_path / "slide.tif", glass(1000, 1000, PINK), um_per_px=None)
    with open_slide(path) as slide, pytest.raises(ResolutionUnknownError):
        find_tiles(slide, spec)


def test_tiles_are_cut_in_order_and_encoded_as_asked(demo_slide: Path, spec: ModelSpec) -> None:
    from PIL import Image

    with open_slide(demo_slide) as slide:
        refs = find_tiles(slide, spec) * 5
        cut = list(iter_tiles(slide, spec, refs))
        assert [ref for ref, _ in cut] == refs
        assert list(iter_tiles(slide, spec)) == cut[: spec.tiles_per_slide]
        for ref, data in cut[:3]:
            image = Image.open(io.BytesIO(data))
            assert (image.format, image.size) == ("JPEG", (128, 128))
            original_HWC = slide.read_region_um(ref.x_px, ref.y_px, 128, 0.5)
            assert np.abs(np.asarray(image).astype(int) - original_HWC).mean() < 4
        assert list(iter_tiles(slide, spec, [])) == []


def test_stopping_half_way_leaves_no_thread_behind(demo_slide: Path, spec: ModelSpec) -> None:
    import threading

    before = threading.active_count()
    with open_slide(demo_slide) as slide:
        tiles = iter_tiles(slide, spec, [TileRef(0, 0, 128, 1.0)] * 100)
        next(tiles)
        tiles.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_darkness_is_the_density_of_tissue_and_not_of_ink(tmp_path: Path, spec: ModelSpec) -> None:
    image_HWC = glass(256, 512)
    image_HWC[:] = PINK
    image_HWC[:128, :128] = (150, 40, 60)
    image_HWC[128:, 256:384] = (25, 25, 28)
    image_HWC[:, 448:] = GLASS
    with open_slide(write(tmp_path / "slide.tif", image_HWC)) as slide:
        tiles = candidate_tiles(slide, spec)
    first = darkest(tiles, 2)
    assert (first[0].x_px, first[0].y_px) == (0, 0)
    pink_density = -np.log10(np.array(PINK) / 255).mean()
    assert first[1].darkness == pytest.approx(pink_density, abs=0.02)
    assert (256, 128) not in {(tile.x_px, tile.y_px) for tile in tiles}, "ink"
    half = next(tile for tile in tiles if (tile.x_px, tile.y_px) == (384, 0))
    assert half.darkness == pytest.approx(pink_density / 2, abs=0.03)
    assert darkest(tiles, 1000) == sorted(tiles, key=lambda tile: -tile.darkness)


@pytest.mark.parametrize("threads", [1, 3])
def test_cut_tiles_come_in_order_whatever_the_threads(
    demo_slide: Path, spec: ModelSpec, threads: int
) -> None:
    with open_slide(demo_slide) as slide:
        refs = find_tiles(slide, spec)
        cut = list(
            cut_tiles(slide, spec, refs, lambda ref, tile_HWC: (ref.x_px, tile_HWC.shape), threads=threads)
        )
    assert cut == [(ref, (ref.x_px, (128, 128, 3))) for ref in refs]
