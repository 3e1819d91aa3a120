"""Pixels of a made-up slide: tissue islands of two textures, ink, dust, dark edges and empty glass.

Nothing here is medicine. One texture is striated ("fibrin-rich"), the other granular ("rich in red cells");
both have the same mean density and the same stain, so a mean colour does not tell them apart. A slide holds
both; the share of the first one is what its label says.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

PATCH_PX = 1024
FIELD_STEP_PX = 8
MAX_DENSITY = 3.0
INKS_RGB = {"black": (28, 26, 30), "blue": (40, 70, 170), "green": (40, 140, 85)}
EOSIN = np.array((0.22, 0.95, 0.60))
HAEMATOXYLIN = np.array((0.80, 1.00, 0.42))


@dataclasses.dataclass(frozen=True)
class SlideLook:
    """What one slide shows.

    Attributes:
        size_px: width and height.
        striated_share: 0..1, share of the tissue that has the striated texture.
        stain_RGB: natural optical density of tissue of density 1 in red, green, blue.
        glass_RGB: colour of empty glass, 0..255.
    """

    size_px: tuple[int, int]
    striated_share: float
    stain_RGB: tuple[float, float, float]
    glass_RGB: tuple[float, float, float]


def render_slide(look: SlideLook, rng: Generator) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] RGB; the same look and generator state give the same pixels."""
    width_px, height_px = look.size_px
    image_HWC = _glass(look, rng)
    tissue, striated, islands = _fields(look, rng)
    _stain(image_HWC, tissue, striated, look, rng)
    _darken_edges(image_HWC, rng)
    _draw_ink(image_HWC, islands, rng)
    _scatter_dust(image_HWC, rng, round(60 * width_px * height_px / 20e6))
    return image_HWC


def _glass(look: SlideLook, rng: Generator) -> NDArray[np.uint8]:
    width_px, height_px = look.size_px
    patch_HWC = np.clip(np.array(look.glass_RGB) + rng.normal(0, 1.2, (512, 512, 3)), 0, 255).astype(np.uint8)
    tiled_HWC = np.tile(patch_HWC, (-(-height_px // 512), -(-width_px // 512), 1))
    return np.ascontiguousarray(tiled_HWC[:height_px, :width_px])


def _smooth_noise(shape: tuple[int, int], scale: float, rng: Generator) -> NDArray[np.float32]:
    """Gaussian noise of unit variance with structures of about `scale` pixels."""
    coarse = rng.normal(size=(max(4, round(shape[0] / scale * 2)), max(4, round(shape[1] / scale * 2))))
    smooth = cv2.resize(coarse.astype(np.float32), shape[::-1], interpolation=cv2.INTER_CUBIC)
    return np.asarray((smooth - smooth.mean()) / (smooth.std() + 1e-6), np.float32)


def _fields(
    look: SlideLook, rng: Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[tuple[float, float, float, float]]]:
    """Tissue density and striated share, 0..255 at full size; islands as (x, y, radius_x, radius_y)."""
    width_px, height_px = look.size_px
    shape = (-(-height_px // FIELD_STEP_PX), -(-width_px // FIELD_STEP_PX))
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32) * FIELD_STEP_PX
    short_px = min(look.size_px)
    distance = np.full(shape, -9, np.float32)
    islands = []
    for _ in range(int(rng.integers(3, 6))):
        radius_x, radius_y = rng.uniform(0.14, 0.26, 2) * short_px
        centre_x = rng.uniform(0.9 * radius_x, width_px - 0.9 * radius_x)
        centre_y = rng.uniform(0.9 * radius_y, height_px - 0.9 * radius_y)
        island = 1 - np.hypot((x - centre_x) / radius_x, (y - centre_y) / radius_y)
        distance = np.maximum(distance, island.astype(np.float32))
        islands.append((centre_x, centre_y, radius_x, radius_y))
    distance += 0.13 * _smooth_noise(shape, short_px / 10 / FIELD_STEP_PX, rng)
    distance -= 0.16 * (_smooth_noise(shape, short_px / 14 / FIELD_STEP_PX, rng) > 1.7)
    inside = distance > 0
    tissue = np.clip(distance * 25, 0, 1) * (1 + 0.10 * _smooth_noise(shape, 90, rng)).clip(0.75, 1.25) / 1.25
    mixture = _smooth_noise(shape, 320 / FIELD_STEP_PX, rng)
    threshold = np.quantile(mixture[inside], 1 - look.striated_share) if inside.any() else 0.0
    striated = 1 / (1 + np.exp(-(mixture - threshold) * 12))
    full = [
        cv2.resize((field * 255).astype(np.uint8), look.size_px, interpolation=cv2.INTER_LINEAR)
        for field in (tissue, striated)
    ]
    return np.asarray(full[0], np.uint8), np.asarray(full[1], np.uint8), islands


def _spectral_patch(gain: NDArray[np.float64], rng: Generator) -> NDArray[np.float32]:
    """Periodic noise of unit variance, [PATCH_PX, PATCH_PX], with this amplitude for each frequency."""
    spectrum = np.fft.rfft2(rng.normal(size=(PATCH_PX, PATCH_PX))) * gain
    patch = np.fft.irfft2(spectrum, (PATCH_PX, PATCH_PX))
    return (patch / patch.std()).astype(np.float32)


def _textures(rng: Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Striated and granular density, periodic, both with mean 1 and the same spread."""
    frequency_y = np.fft.fftfreq(PATCH_PX)[:, None]
    frequency_x = np.fft.rfftfreq(PATCH_PX)[None, :]
    radius = np.hypot(frequency_x, frequency_y)
    angle = np.arctan2(frequency_y, frequency_x)
    wavelength_px = rng.uniform(11, 15)
    band = np.exp(-(((radius * wavelength_px - 1) / 0.35) ** 2))
    direction = rng.uniform(0, np.pi)
    narrow = np.exp(-((np.sin(angle - direction) / 0.16) ** 2))
    bend_x, bend_y = (26 * _spectral_patch(np.exp(-((radius * 300) ** 2)), rng) for _ in range(2))
    column, row = np.meshgrid(np.arange(PATCH_PX, dtype=np.float32), np.arange(PATCH_PX, dtype=np.float32))
    straight = _spectral_patch(band * narrow, rng)
    striated = cv2.remap(
        straight, column + bend_x, row + bend_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP
    )
    granular = _spectral_patch(band, rng)
    fine = _spectral_patch(np.exp(-(((radius * 4 - 1) / 0.5) ** 2)), rng)
    both = []
    for texture in (striated, granular):
        texture = np.tanh(1.3 * texture) + 0.25 * fine
        both.append((1 + 0.30 * (texture - texture.mean()) / texture.std()).astype(np.float32))
    return both[0], both[1]


def _nuclei(rng: Generator) -> NDArray[np.bool_]:
    patch = np.zeros((PATCH_PX, PATCH_PX), np.uint8)
    for x, y, radius in zip(*rng.integers(0, PATCH_PX, (2, 110)), rng.integers(4, 8, 110), strict=True):
        axes = (int(radius), int(radius) - 1)
        cv2.ellipse(patch, (int(x), int(y)), axes, float(x % 180), 0, 360, (1,), -1)
    return patch > 0


def _stain(
    image_HWC: NDArray[np.uint8],
    tissue: NDArray[np.uint8],
    striated: NDArray[np.uint8],
    look: SlideLook,
    rng: Generator,
) -> None:
    """Let tissue absorb light (Beer-Lambert), patch by patch, in place."""
    striated_patch, granular_patch = _textures(rng)
    nuclei_patch = _nuclei(rng)
    levels = np.arange(256)[:, None] / 255 * MAX_DENSITY
    glass = np.array(look.glass_RGB)
    tissue_table = np.round(glass * np.exp(-levels * np.array(look.stain_RGB))).astype(np.uint8)
    nucleus_stain = HAEMATOXYLIN * np.array(look.stain_RGB) / EOSIN + 0.25 * np.array(look.stain_RGB)
    nucleus_table = np.round(glass * np.exp(-levels * nucleus_stain)).astype(np.uint8)
    height_px, width_px = tissue.shape
    for top in range(0, height_px, PATCH_PX):
        for left in range(0, width_px, PATCH_PX):
            block = np.s_[top : top + PATCH_PX, left : left + PATCH_PX]
            presence = tissue[block]
            if not presence.any():
                continue
            cut = np.s_[: presence.shape[0], : presence.shape[1]]
            share = striated[block].astype(np.float32) / 255
            density = granular_patch[cut] + share * (striated_patch[cut] - granular_patch[cut])
            density *= presence.astype(np.float32) * (1.25 / MAX_DENSITY)
            index = np.clip(density, 0, 255).astype(np.uint8)
            stained = tissue_table[index]
            nuclei = nuclei_patch[cut] & (presence > 100)
            stained[nuclei] = nucleus_table[index[nuclei]]
            inside = presence > 0
            image_HWC[block][inside] = stained[inside]


def _darken_edges(image_HWC: NDArray[np.uint8], rng: Generator) -> None:
    """The rim of the glass: a dark, neutral band along up to two sides."""
    for side in rng.permutation(4)[: int(rng.integers(0, 3))].tolist():
        view_HWC = np.rot90(image_HWC, side)
        depth_px = int(rng.uniform(0.008, 0.025) * view_HWC.shape[0])
        light = np.linspace(rng.uniform(0.12, 0.4), 0.95, depth_px)[:, None, None]
        view_HWC[:depth_px] = (view_HWC[:depth_px] * light).astype(np.uint8)


def _draw_ink(
    image_HWC: NDArray[np.uint8], islands: list[tuple[float, float, float, float]], rng: Generator
) -> None:
    """Strokes and circles of a felt pen, as often over as beside tissue; translucent as ink is."""
    height_px, width_px = image_HWC.shape[:2]
    short_px = min(height_px, width_px)
    for _ in range(int(rng.integers(0, 4))):
        ink_RGB = INKS_RGB[str(rng.choice([*INKS_RGB]))]
        mask = np.zeros((height_px, width_px), np.uint8)
        thickness_px = max(2, int(rng.uniform(0.008, 0.02) * short_px))
        if rng.random() < 0.4:
            x, y, radius_x, radius_y = islands[int(rng.integers(len(islands)))]
            axes = (int(1.25 * radius_x), int(1.25 * radius_y))
            start = float(rng.uniform(0, 360))
            cv2.ellipse(
                mask, (int(x), int(y)), axes, 0, start, start + 250, (255,), thickness_px, cv2.LINE_AA
            )
        else:
            points = np.cumsum(rng.normal(0, 0.05, (9, 2)) + rng.normal(0, 0.05, 2), axis=0)
            points = (points + rng.uniform(0.1, 0.9, 2)) * (width_px, height_px)
            cv2.polylines(mask, [points.astype(np.int32)], False, (255,), thickness_px, cv2.LINE_AA)
        x, y, width, height = cv2.boundingRect(mask)
        if not width:
            continue
        area_HWC = image_HWC[y : y + height, x : x + width]
        cover = mask[y : y + height, x : x + width, None].astype(np.float32) / 255 * rng.uniform(0.8, 1.0)
        light = 1 - cover * (1 - np.array(ink_RGB, np.float32) / 255)
        area_HWC[:] = (area_HWC * light).astype(np.uint8)


def _scatter_dust(image_HWC: NDArray[np.uint8], rng: Generator, count: int) -> None:
    height_px, width_px = image_HWC.shape[:2]
    for _ in range(count):
        x, y = int(rng.integers(width_px)), int(rng.integers(height_px))
        shade = int(rng.integers(40, 150))
        colour = (min(255, shade + int(rng.integers(0, 45))), shade, max(0, shade - int(rng.integers(0, 25))))
        if rng.random() < 0.15:
            points = np.cumsum(rng.normal(0, 14, (7, 2)), axis=0) + np.array((x, y))
            cv2.polylines(image_HWC, [points.astype(np.int32)], False, colour, 3, cv2.LINE_AA)
        else:
            axes = (int(rng.integers(3, 24)), int(rng.integers(3, 24)))
            cv2.ellipse(image_HWC, (x, y), axes, float(rng.uniform(0, 180)), 0, 360, colour, -1, cv2.LINE_AA)
