"""python -m slides.native

Compiles the fast path for plain JPEG tiles (see slides/native/__init__.py) with PyPI's `ziglang`, compares it with libjpeg-turbo and puts
it where `slides.decode` looks for it. Tiles are decoded without it too, to the same pixels, a third slower.
"""

from __future__ import annotations

import argparse
import sys

from slides.native.building import NativeBuildError, build


def main() -> int:
    """Returns the exit code."""
    argparse.ArgumentParser(
        prog="python -m slides.native",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    try:
        print(f"compiled {build()}")
    except NativeBuildError as error:
        print(
            f"error: {error} Tiles are decoded by libjpeg-turbo: the same pixels, a third slower.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
