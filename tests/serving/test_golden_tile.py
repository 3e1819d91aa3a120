"""The server's Python decodes a tile to the very pixels that training and the client see."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from serving.embedded import triton_home
from slides.decode import decode_tile

ROOT = Path(__file__).parents[2]
GOLDEN_TILE = ROOT / "tests" / "slides" / "golden_tile.jpg"
CODE = """
import hashlib, sys
import numpy
from pathlib import Path
from slides.decode import decode_tile
print(numpy.__version__)
data = Path(sys.argv[1]).read_bytes()
for size in map(int, sys.argv[2:]):
    print(hashlib.sha256(decode_tile(data, size).tobytes()).hexdigest())
"""


def test_the_stubs_environment_gives_the_same_pixels_under_numpy_1() -> None:
    python = triton_home() / "python" / "bin" / "python3"
    if not python.exists():
        pytest.skip("the embedded server is not installed")
    sizes = ["64", "128", "224", "300"]
    done = subprocess.run(
        [python, "-c", CODE, GOLDEN_TILE, *sizes], capture_output=True, text=True, check=True
    )
    version, *served = done.stdout.split()
    assert version == "1.26.4"
    data = GOLDEN_TILE.read_bytes()
    assert served == [hashlib.sha256(decode_tile(data, int(size)).tobytes()).hexdigest() for size in sizes]
