"""Compiling the fast path: with clang as `zig cc`, which PyPI's package `ziglang` brings, so that no compiler need be there."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import simplejpeg

from slides.errors import SlidesError
from slides.native import HERE, TARGETS, Decode, library_path, load_from, source_sha256, why_not

OPTIONS = ("-O3", "-fwrapv", "-shared", "-fPIC", "-s", "-Wall", "-Wextra", "-Werror")


class NativeBuildError(SlidesError):
    """The fast path cannot be had here; tiles are decoded by libjpeg-turbo."""


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
    made = path.with_name(f".{path.name}.{os.getpid()}.partial")
    command = [sys.executable, "-m", "ziglang", "cc", *OPTIONS, "-target", target, f"-mcpu={processor}"]
    command += [f'-DSOURCE="{source_sha256()}"', "-o", str(made), str(HERE / "tile_jpeg.c")]
    try:
        with tempfile.TemporaryDirectory(prefix="clotline-native-") as directory:
            cache = {f"ZIG_{which}_CACHE_DIR": directory for which in ("GLOBAL", "LOCAL")}
            done = subprocess.run(command, env={**os.environ, **cache}, capture_output=True, text=True)
        if done.returncode:
            hint = "the compiler's last words are above"
            hint = "pip install ziglang" if "No module named" in done.stderr else hint
            raise NativeBuildError(f"{done.stderr.strip()[-2000:]}\nThe fast path was not compiled ({hint}).")
        decode = load_from(made)
        if decode is None or not agrees(decode):
            raise NativeBuildError(
                "the compiled fast path gives other pixels than libjpeg-turbo; it is not used."
            )
        made.replace(path)
    except OSError as error:
        raise NativeBuildError(f"{path} cannot be made: {error}.") from error
    finally:
        made.unlink(missing_ok=True)
    return path


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
