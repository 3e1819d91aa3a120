"""Whether a release is, byte for byte, what an export wrote; and whether its files still answer as they did.

The release ties everything to one SHA-256, the one in release.json: whoever knows it from elsewhere (a registry, a log, a
signature) knows all of the release. Without it, `verify` finds damage, but not someone who writes a new manifest as well.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from exporters.errors import ReleaseError, ReleaseVersionError
from exporters.release_manifest import MANIFEST_NAME, Manifest, file_entry, load

_UNKNOWN = "an export did not write it"
_ORIGIN = {
    "__pycache__": "byte code, which Python may run in place of a model's code; delete it, and serve with "
    "PYTHONDONTWRITEBYTECODE=1 or from a copy"
}


def verify(release: Path | str) -> Manifest:
    """The manifest of a release that is whole.

    Raises:
        ReleaseVersionError: it is no release, or of a version that this code does not read.
        ReleaseError: files were changed, are missing or extra, or the manifest was altered; lists all of them.
    """
    release = Path(release)
    manifest, problems = examine(release)
    if problems or manifest is None:
        count = len(problems)
        raise ReleaseError(
            f"{release} is not as it was written: {count} problem{'s' if count != 1 else ''}", problems
        )
    return manifest


def examine(
    release: Path, announce: Callable[[str], object] = lambda path: None
) -> tuple[Manifest | None, list[str]]:
    """The manifest, None where it is damaged, and all that is wrong with the release.

    Args:
        announce: told the path of each file before it is read.

    Raises:
        ReleaseVersionError: it is no release, or of a version that this code does not read.
    """
    try:
        manifest = load(release)
    except ReleaseVersionError:
        raise
    except ReleaseError as error:
        return None, [f"{MANIFEST_NAME}: {problem}" for problem in error.problems] or [str(error)]
    problems = []
    found: dict[str, Path] = {}
    extra = ""
    for path, kind in _walk(release):
        name = path.relative_to(release).as_posix()
        if extra and name.startswith(extra):
            continue  # told with its directory
        if kind == "directory" and not any(listed.startswith(f"{name}/") for listed in manifest.files):
            extra = f"{name}/"
            problems.append(f"{extra} is extra: {_ORIGIN.get(path.name, _UNKNOWN)}")
        elif kind == "file" and name not in manifest.files and name != MANIFEST_NAME:
            problems.append(f"{name} is extra: {_UNKNOWN}")
        elif kind == "file":
            found[name] = path
        elif kind != "directory":
            problems.append(f"{name} is {kind}: a release has plain files only")
    strange = {problem.split(" is ")[0] for problem in problems}
    for name, entry in manifest.files.items():
        if name not in found:
            if name not in strange:
                problems.append(f"{name} is missing")
            continue
        announce(name)
        problem = _changed(found[name], name, entry.sha256, entry.bytes)
        if problem is not None:
            problems.append(problem)
    return manifest, sorted(problems)


def _changed(path: Path, name: str, sha256: str, size_bytes: int) -> str | None:
    try:
        now = file_entry(path)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    if now.bytes != size_bytes:
        return f"{name} is changed: it has {now.bytes} bytes, {size_bytes} were written"
    if now.sha256 != sha256:
        return f"{name} is changed: it has SHA-256 {now.sha256}, {sha256} was written"
    return None


def _walk(root: Path) -> Iterator[tuple[Path, str]]:
    """Everything below `root`, without following links: path and "file", "directory", "a link to X" or what it is."""
    for entry in sorted(root.iterdir()):
        mode = entry.lstat().st_mode
        if stat.S_ISLNK(mode):
            yield entry, f"a link to {os.readlink(entry)}"
        elif stat.S_ISDIR(mode):
            yield entry, "directory"
            yield from _walk(entry)
        else:
            yield entry, "file" if stat.S_ISREG(mode) else "no plain file"
