"""python -m slides.native

Compiles the fast path for plain JPEG tiles (see slides/native/__init__.py) with PyPI's `ziglang`, compares it with libjpeg-turbo and puts
it where `slides.decode` looks for it. Tiles are decoded without it too, to the same pixels, a third slower.
"""

from __future__ import annotations

import sys

from slides.native.building import build
from slides.native.compiler import command


def main() -> int:
    """Returns the exit code."""
    return command(
        "python -m slides.native",
        __doc__,
        build,
        "Tiles are decoded by libjpeg-turbo: the same pixels, a third slower.",
    )


if __name__ == "__main__":
    sys.exit(main())
