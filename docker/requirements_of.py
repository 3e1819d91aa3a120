"""python3 docker/requirements_of.py EXTRA...

Prints what pyproject.toml requires, with those of its extras: a layer of an image that changes only when they do.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tomllib

PROJECT = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]


def requirements(extra: str) -> set[str]:
    """Of one extra; `clotline[a,b]` in it stands for those of `a` and `b`."""
    found = set()
    for line in PROJECT["optional-dependencies"][extra]:
        own = line.removeprefix("clotline[").removesuffix("]") if line.startswith("clotline[") else ""
        found |= set().union(*map(requirements, own.split(","))) if own else {line}
    return found


if __name__ == "__main__":
    print("\n".join(sorted(set(PROJECT["dependencies"]).union(*map(requirements, sys.argv[1:])))))
