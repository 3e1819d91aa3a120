"""What tritonserver is started with so that bad JSON is the client's error (400), not the server's (500): json_refusals.c.

`python -m serving.native` compiles it for this machine, into this directory; `make install` does. Without the library, or with
`CLOTLINE_JSON_REFUSALS=off` in the environment, Triton answers 500 to a request whose JSON it cannot parse.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "json_refusals.c"
SWITCH_VARIABLE = "CLOTLINE_JSON_REFUSALS"
LIBRARIES = "clotline_json_refusals-*.so"
_MACHINES = {"x86_64": "x86_64-linux-gnu.2.28", "aarch64": "aarch64-linux-gnu.2.28"}


def target() -> str | None:
    """zig's name for this kind of machine, None for one of which nothing is known."""
    return _MACHINES.get(platform.machine())


def library_path() -> Path:
    """Where the library of this source and kind of machine lies."""
    source = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    return HERE / LIBRARIES.replace("*", f"{platform.machine()}-{source}")


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
