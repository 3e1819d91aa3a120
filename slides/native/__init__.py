"""The fast path of `slides.decode` for plain JPEG tiles: compiled code that gives the same pixels as libjpeg-turbo, sooner.

`python -m slides.native` compiles tile_jpeg.c for this machine, into this directory; `make install` does. Without the library, with one of
another source, or on a processor that is too old for it, tiles are decoded by libjpeg-turbo alone: the same pixels, a third
slower. `CLOTLINE_NATIVE_JPEG=off` in the environment leaves it out. This module needs numpy only.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slides.switches import is_off

HERE = Path(__file__).resolve().parent
SOURCES = ("tile_jpeg.c", "codes.h", "samples.h")
SWITCH_VARIABLE = "CLOTLINE_NATIVE_JPEG"
DECODERS = ("libjpeg-turbo", "slides.native")
"""What decodes plain JPEG tiles: without the compiled library, and with it."""
# Machine -> (zig's name for it, its processor, what the kernel must say of it). x86-64-v3 is any of the last ten years: Haswell, Zen.
TARGETS = {
    "x86_64": ("x86_64-linux-gnu.2.28", "x86_64_v3", {"avx2", "bmi1", "bmi2", "fma", "f16c", "abm", "movbe"}),
    "aarch64": ("aarch64-linux-gnu.2.28", "generic", {"asimd"}),
}

Decode = Callable[[bytes, int, int, int], "NDArray[np.uint8] | None"]


def library_path() -> Path:
    """Where the library of this kind of machine lies."""
    return HERE / f"tile_jpeg-{platform.machine()}.so"


def source_sha256() -> str:
    """Hexadecimal SHA-256 of the source that lies here."""
    return hashlib.sha256(b"".join((HERE / name).read_bytes() for name in SOURCES)).hexdigest()


def why_not() -> str | None:
    """Why this machine cannot run the library, None if it can."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in TARGETS:
        return f"there is no fast path for {sys.platform} on {machine}"
    words = set(Path("/proc/cpuinfo").read_text().split())
    missing = sorted(TARGETS[machine][2] - words)
    return f"the processor has no {', '.join(missing)}" if missing else None


def load() -> Decode | None:
    """The decoder, None where it is switched off, was not compiled from this source, or cannot run here.

    It takes a file, its width and height in pixels as its header tells them, and a factor 1, 2, 4 or 8, and gives uint8 [ceil(height /
    factor), ceil(width / factor), 3], RGB: to the bit what libjpeg-turbo decodes with its accurate integer DCT; or None for a file that
    it does not decode, which may be a good one. It may be called from several threads.
    """
    if is_off(SWITCH_VARIABLE):
        return None
    try:
        return None if why_not() else load_from(library_path())
    except (OSError, AttributeError):  # no library, or one of something else
        return None


def load_from(path: Path) -> Decode | None:
    """The decoder of a library, None for one of another source; raises OSError if it is none, AttributeError if of something else."""
    library = ctypes.CDLL(str(path))
    library.clotline_tile_jpeg_source.restype = ctypes.c_char_p
    if library.clotline_tile_jpeg_source() != source_sha256().encode():
        return None
    function = library.clotline_tile_jpeg
    number = ctypes.c_int
    function.argtypes = [ctypes.c_char_p, ctypes.c_size_t, number, number, number, ctypes.c_void_p]

    def decode(data: bytes, width_px: int, height_px: int, factor: int) -> NDArray[np.uint8] | None:
        rgb_HWC = np.empty((-(-height_px // factor), -(-width_px // factor), 3), np.uint8)
        declined = function(data, len(data), factor, width_px, height_px, rgb_HWC.ctypes.data)
        return None if declined else rgb_HWC

    return decode
