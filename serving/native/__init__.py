"""A small library that tritonserver loads before its own. With it

- bad JSON is the client's error (400), not the server's (500): json_refusals.c;
- the memory of a large request is given back once it is free: memory_return.c.

`python -m serving.native` compiles it for this machine, into this directory; `make install` does. tritonserver serves without it
too. `CLOTLINE_PRELOAD=off` in the environment leaves it out.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = (HERE / "json_refusals.c", HERE / "memory_return.c")
SWITCH_VARIABLE = "CLOTLINE_PRELOAD"
LIBRARIES = "clotline_preload-*.so"


def library_path() -> Path:
    """Where the library of these sources and kind of machine lies."""
    sha256 = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()[:12]
    return HERE / LIBRARIES.replace("*", f"{platform.machine()}-{sha256}")


def preloaded(environment: Mapping[str, str]) -> dict[str, str]:
    """What tritonserver's environment has to say so that it loads the library first; nothing where there is none.

    The dynamic linker splits LD_PRELOAD at spaces and colons (ld.so(8)), and a path may hold them. So the library is named by its
    file alone, and LD_LIBRARY_PATH, which is split at colons and semicolons, says where it lies.
    """
    path = library_path()
    if not path.is_file() or set(":;") & set(str(path)):
        return {}
    libraries = [str(path.parent), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
    preload = [path.name, *filter(None, [environment.get("LD_PRELOAD")])]
    return {"LD_LIBRARY_PATH": ":".join(libraries), "LD_PRELOAD": ":".join(preload)}
