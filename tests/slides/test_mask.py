from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from slides.mask import tissue_mask
from slides.reader import open_slide

GLASS, PINK, PURPLE = (240, 238, 241), (205, 100, 140), (75, 36, 88)


def slide_with_tissue(um_per_px: float = 8.0) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """2.4 x 1.6 mm of glass with a disc of pink tissue of 1 mm, and where that is."""
    size_px = (round(2400 / um_per_px), round(1600 / um_per_px))
    noise_HWC = np.random.default_rng(0).normal(0, 1.5, (size_px[1], size_px[0], 3))
    image_HWC = np.clip(np.array(GLASS) + noise_HWC, 0, 255).astype(np.uint8)
    disc_HW = np.zeros(size_px[::-1], np.uint8)
    cv2.circle(disc_HW, (size_px[0] // 3, size_px[1] // 2), round(500 / um_per_px), (1,), -1)
    image_HWC[disc_HW > 0] = np.clip(np.array(PINK) + 4 * noise_HWC[disc_HW > 0], 0, 255).astype(np.uint8)
    return image_HWC, disc_HW > 0


def drawn_over(
    image_HWC: NDArray[np.uint8], ink: tuple[int, int, int], um_per_px: float = 8.0
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A stroke of 160 um across glass and tissue: ink lets through a share of the light that comes."""
    stroke_HW = np.zeros(image_HWC.shape[:2], np.uint8)
    ends = (np.array([(200, 700), (2200, 900)]) / um_per_px).astype(int).tolist()
    cv2.line(stroke_HW, ends[0], ends[1], (1,), round(160 / um_per_px))
    inked_HWC = image_HWC.copy()
    inked_HWC[stroke_HW > 0] = (inked_HWC[stroke_HW > 0] * (np.array(ink) / 255)).astype(np.uint8)
    return inked_HWC, stroke_HW > 0


@pytest.mark.parametrize("um_per_px", [4.0, 8.0])
@pytest.mark.parametrize(
    "ink", [(28, 26, 30), (40, 70, 170), (40, 140, 85), (70, 60, 60), (25, 90, 120)], ids=str
)
def test_ink_is_cut_out_of_tissue_and_glass(ink: tuple[int, int, int], um_per_px: float) -> None:
    image_HWC, tissue_HW = slide_with_tissue(um_per_px)
    inked_HWC, stroke_HW = drawn_over(image_HWC, ink, um_per_px)
    mask_HW = tissue_mask(inked_HWC, um_per_px)
    assert mask_HW[stroke_HW].mean() < 0.02
    away_HW = cv2.dilate(stroke_HW.astype(np.uint8), np.ones((7, 7))) == 0
    assert mask_HW[tissue_HW & away_HW].mean() > 0.98
    assert mask_HW[~tissue_HW & away_HW].mean() < 0.01


@pytest.mark.parametrize("red", [(225, 30, 50), (205, 25, 45), (200, 20, 40)], ids=str)
def test_red_ink_on_glass_is_no_tissue(red: tuple[int, int, int]) -> None:
    image_HWC, tissue_HW = slide_with_tissue()
    inked_HWC, stroke_HW = drawn_over(image_HWC, red)
    mask_HW = tissue_mask(inked_HWC)
    assert mask_HW[stroke_HW & ~tissue_HW].mean() < 0.1
    assert mask_HW[tissue_HW & ~stroke_HW].mean() > 0.95


@pytest.mark.parametrize("red", [(150, 40, 60), (190, 60, 50), (200, 40, 60), (215, 60, 80)], ids=str)
def test_a_red_clot_is_no_ink(red: tuple[int, int, int]) -> None:
    """Where the slide's own stain is a pure red, purity says nothing."""
    image_HWC, tissue_HW = slide_with_tissue()
    image_HWC[tissue_HW] = red
    assert tissue_mask(image_HWC)[tissue_HW].mean() > 0.97


def test_dark_purple_tissue_and_nuclei_are_no_ink() -> None:
    """Keratin and dense nuclei are as dark as ink, but have the ratio of blue to green of the tissue around."""
    image_HWC, tissue_HW = slide_with_tissue()
    cv2.ellipse(image_HWC, (100, 100), (35, 12), 30, 0, 360, PURPLE, -1)
    for k in range(60):
        x, y = 100 + 45 * np.cos(k), 100 + 45 * np.sin(1.7 * k)
        cv2.circle(image_HWC, (int(x), int(y)), 0, (60, 50, 80), -1)
    assert tissue_mask(image_HWC)[tissue_HW].mean() > 0.98


def test_shadows_and_dark_rims_are_no_tissue() -> None:
    """The shadow of a cover slip is soft and slightly warm, the rim of the glass dark."""
    image_HWC, tissue_HW = slide_with_tissue()
    light_W = np.interp(np.arange(image_HWC.shape[1]), [230, 255, 262, 290], [1.0, 0.55, 0.5, 1.0])[
        None, :, None
    ]
    shaded_HWC = (image_HWC * light_W ** np.array((0.9, 1.0, 1.1))).astype(np.uint8)
    shaded_HWC[:20] = shaded_HWC[:20] // 5
    mask_HW = tissue_mask(shaded_HWC)
    assert mask_HW[~tissue_HW].mean() < 0.005
    assert mask_HW[tissue_HW].mean() > 0.98


def test_fragments_count_if_they_have_the_colour_of_the_tissue() -> None:
    image_HWC, _ = slide_with_tissue()
    cv2.circle(image_HWC, (230, 60), 3, PINK, -1)  # 56 um
    cv2.circle(image_HWC, (230, 140), 3, (130, 100, 80), -1)  # dust: brown
    mask_HW = tissue_mask(image_HWC)
    assert mask_HW[57:64, 227:234].mean() > 0.6
    assert not mask_HW[130:150, 220:240].any()


def test_a_real_slide_of_skin(aperio: Path) -> None:
    """Skin with eosin-red collagen, dense purple epithelium and keratin, threads of green ink at its edges."""
    with open_slide(aperio) as slide:
        thumbnail_HWC = slide.thumbnail(742)
    mask_HW = tissue_mask(thumbnail_HWC, 2.0)
    assert 0.30 < mask_HW.mean() < 0.42
    value_HW = thumbnail_HWC.astype(int)
    bright_HW = value_HW.min(axis=2) > 225
    assert mask_HW[cv2.erode(bright_HW.astype(np.uint8), np.ones((9, 9))) > 0].mean() < 0.01, "glass"
    purple_HW = (
        (value_HW[:, :, 1] < 60) & (value_HW[:, :, 0] < 130) & (value_HW[:, :, 2] > value_HW[:, :, 1] + 20)
    )
    assert purple_HW.sum() > 3000
    assert mask_HW[purple_HW].mean() > 0.75, "dark purple epithelium and keratin"
    green_HW = value_HW[:, :, 1] > value_HW[:, :, 0] + 25
    assert mask_HW[green_HW].mean() < 0.35, "green ink"
