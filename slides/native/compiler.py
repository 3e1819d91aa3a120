"""clang as `zig cc`, which PyPI's package `ziglang` brings, so that no compiler need be there."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from slides.errors import SlidesError

OPTIONS = ("-shared", "-fPIC", "-s", "-Wall", "-Wextra", "-Werror")


class NativeBuildError(SlidesError):
    """A library cannot be had here."""


def compile_library(
    sources: Sequence[Path], path: Path, options: Sequence[str], check: Callable[[Path], None]
) -> None:
    """Compile C files into the shared library `path`, which appears whole, and only if it was accepted.

    The system's libraries, which zig makes first, are kept where ZIG_GLOBAL_CACHE_DIR says, if it does.

    Args:
        sources: the C files.
        path: of the library.
        options: of clang, besides OPTIONS.
        check: is given the compiled library, and raises NativeBuildError if it is not to be used.

    Raises:
        NativeBuildError: there is no compiler, it failed, or `check` says so.
    """
    made = path.with_name(f".{path.name}.{os.getpid()}.partial")
    command = [sys.executable, "-m", "ziglang", "cc", *OPTIONS, *options, "-o", str(made), *map(str, sources)]
    try:
        with tempfile.TemporaryDirectory(prefix="clotline-native-") as directory:
            environment = {"ZIG_GLOBAL_CACHE_DIR": directory, **os.environ, "ZIG_LOCAL_CACHE_DIR": directory}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            hint = "the compiler's last words are above"
            hint = "pip install ziglang" if "No module named" in done.stderr else hint
            raise NativeBuildError(f"{done.stderr.strip()[-2000:]}\n{path.name} was not compiled ({hint}).")
        check(made)
        made.replace(path)
    except OSError as error:
        raise NativeBuildError(f"{path} cannot be made: {error}.") from error
    finally:
        made.unlink(missing_ok=True)


def command(prog: str, description: str | None, build: Callable[[], Path], without: str) -> int:
    """A command that builds one library; returns its exit code.

    Args:
        prog, description: for --help.
        build: makes it and returns its path; raises NativeBuildError.
        without: what it means that there is none.
    """
    argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    try:
        print(f"compiled {build()}")
    except NativeBuildError as error:
        print(f"error: {error} {without}", file=sys.stderr)
        return 1
    return 0
