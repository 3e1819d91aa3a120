"""python -m serving.native

Compiles the library that `serving up` loads into tritonserver (see serving/native/__init__.py), with PyPI's `ziglang`, and puts it
where it looks for it.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

from serving.native import HERE, LIBRARIES, SOURCES, library_path
from slides.native import TARGETS
from slides.native.compiler import NativeBuildError, command, compile_library


def build() -> Path:
    """Compile, and take away what was compiled from an older source; raises NativeBuildError."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in TARGETS:
        raise NativeBuildError(f"there is no library for {sys.platform} on {machine}.")
    target, _, _ = TARGETS[machine]
    path = library_path()
    compile_library(SOURCES, path, ["-O2", "-fvisibility=hidden", "-target", target], _check)
    for other in HERE.glob(LIBRARIES):
        if other != path:
            other.unlink(missing_ok=True)
    return path


def _check(path: Path) -> None:
    try:
        _ = ctypes.CDLL(str(path)).TRITONSERVER_ErrorNew
    except (OSError, AttributeError) as error:
        raise NativeBuildError(f"the compiled library cannot be used: {error}.") from error


def main() -> int:
    """Returns the exit code."""
    return command(
        "python -m serving.native",
        __doc__,
        build,
        "Triton answers 500, not 400, to bad JSON, and keeps the memory of large requests longer.",
    )


if __name__ == "__main__":
    sys.exit(main())
