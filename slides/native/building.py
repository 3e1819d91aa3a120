"""Compiling the fast path, and comparing it with libjpeg-turbo."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import simplejpeg

from slides.native import HERE, TARGETS, Decode, library_path, load_from, source_sha256, why_not
from slides.native.compiler import NativeBuildError, compile_library

OPTIONS = ("-O3", "-fwrapv")


def build() -> Path:
    """Compile, compare with libjpeg-turbo, and put in place; returns the library's path.

    Raises:
        NativeBuildError: this machine cannot run it, there is no compiler, it failed, or the pixels differ.
    """
    reason = why_not()
    if reason:
        raise NativeBuildError(f"{reason}.")
    target, processor, _ = TARGETS[platform.machine()]
    path = library_path()
    options = [*OPTIONS, "-target", target, f"-mcpu={processor}", f'-DSOURCE="{source_sha256()}"']
    compile_library([HERE / "tile_jpeg.c"], path, options, _check)
    return path


def _check(path: Path) -> None:
    decode = load_from(path)
    if decode is None or not agrees(decode):
        raise NativeBuildError(
            "the compiled fast path gives other pixels than libjpeg-turbo; it is not used."
        )


def agrees(decode: Decode) -> bool:
    """True if it decodes noise at every factor as libjpeg-turbo does."""
    rng = np.random.default_rng(7)
    side_px = 72
    noise_HWC = np.clip(rng.normal(128, 60, (side_px, side_px, 3)), 0, 255).astype(np.uint8)
    for quality in (30, 75, 100):
        data = simplejpeg.encode_jpeg(noise_HWC, quality, "RGB", "444")
        for factor in (1, 2, 4, 8):
            wanted_HWC = simplejpeg.decode_jpeg(
                data, "RGB", min_height=side_px // factor, min_width=side_px // factor
            )
            got_HWC = decode(data, side_px, side_px, factor)
            if got_HWC is None or not np.array_equal(got_HWC, wanted_HWC):
                return False
    return True
