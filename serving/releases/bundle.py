"""Reading a Release directory and copying its models, every byte checked on the way. No code of the release is run.

RELEASE/release.json   the manifest (docs/releases.md)
RELEASE/models/        a complete Triton model repository, every version directory is 1
RELEASE/golden/        golden.json, and encoded tiles that it has PyTorch's answers to
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.releases.errors import BadRelease, ReleaseError

MANIFEST = "release.json"
FORMAT, VERSION = "clotline.release", 2
MODELS, GOLDEN = "models", "golden"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
NUMBERED = re.compile(r"__r[0-9]+$")
CHUNK_BYTES = 1 << 20
PROBLEMS_TOLD = 5


@dataclass(frozen=True)
class Bundle:
    """A release as its manifest tells it; `verify` or `copy_to` holds its files against that."""

    directory: Path
    manifest: Mapping[str, Any]

    @property
    def release_id(self) -> str:
        """The first 16 hexadecimal digits of a SHA-256 over all that is served and all golden examples."""
        return str(self.manifest["release_id"])

    @property
    def public(self) -> list[str]:
        """Names of the models that clients ask."""
        return sorted(self.manifest["classifiers"])

    def files_below(self, folder: str) -> dict[str, Mapping[str, Any]]:
        """Path -> {"sha256", "bytes"} of the files below `models` or `golden`."""
        return {p: e for p, e in sorted(self.manifest["files"].items()) if p.startswith(f"{folder}/")}

    def verify(self) -> None:
        """Hold every file below models/ and golden/ against its SHA-256, copying nothing.

        Raises BadRelease naming changed, missing and extra files.
        """
        self._each_file(None)

    def copy_to(self, target: Path) -> None:
        """Copy models/ and golden/ into `target`, checking what is copied, and write it to the disk.

        Raises BadRelease naming changed, missing and extra files; `target` is then incomplete and of no use.
        """
        self._each_file(target)

    def _each_file(self, target: Path | None) -> None:
        problems = []
        listed = {**self.files_below(MODELS), **self.files_below(GOLDEN)}
        for path, entry in listed.items():
            source = self.directory / path
            try:
                if _leads_out(source, self.directory):
                    problems.append(f"{path} is a symbolic link")
                    continue
                sha256, size = _copy(source, target / path if target else None)
            except FileNotFoundError:
                if source.exists():
                    raise
                problems.append(f"{path} is missing")
                continue
            except (IsADirectoryError, NotADirectoryError):
                problems.append(f"{path} is no file")
                continue
            if (sha256, size) != (entry["sha256"], entry["bytes"]):
                problems.append(f"{path} was changed (SHA-256 {sha256[:12]}... of {size} bytes)")
        problems += [f"{path} is not in the manifest" for path in self._extra(listed)]
        if problems:
            more = f"; and {len(problems) - PROBLEMS_TOLD} more" if len(problems) > PROBLEMS_TOLD else ""
            raise BadRelease(
                f"{self.directory} is not what its {MANIFEST} says: {'; '.join(problems[:PROBLEMS_TOLD])}{more}. Copy it "
                "again, or export again; nothing was changed on the server."
            )

    def _extra(self, listed: Mapping[str, Any]) -> Iterator[str]:
        for folder in (MODELS, GOLDEN):
            for parent, _, files in os.walk(self.directory / folder):
                for file in sorted(files):
                    path = str((Path(parent) / file).relative_to(self.directory))
                    if path not in listed:
                        yield path


def read_bundle(directory: Path) -> Bundle:
    """Read the manifest of a release, and see that it makes sense.

    Raises BadRelease if there is none, it was altered, it is of another version, or it names impossible models or paths.
    """
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BadRelease(
            f"{path} does not exist: {directory} is no release; make one with `python -m exporters export CHECKPOINT "
            "--release DIR`."
        ) from None
    except (OSError, ValueError) as error:
        raise BadRelease(f"{path} cannot be read: {error}.") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise BadRelease(f"{path} is not the manifest of a release.")
    if values.get("version") != VERSION:
        raise BadRelease(
            f"{path} has version {values.get('version')!r}, and this server reads version {VERSION}: export again."
        )
    said = values.pop("sha256", None)
    if said != hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest():
        raise BadRelease(f"{path} was altered after it was written (its sha256 differs); export again.")
    try:
        problems = list(_problems(values))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadRelease(f"{path} is not complete: {type(error).__name__} {error}; export again.") from error
    if problems:
        raise BadRelease(f"{path}: {'; '.join(problems[:PROBLEMS_TOLD])}; export again.")
    return Bundle(directory.resolve(), values)


def _problems(values: Mapping[str, Any]) -> Iterator[str]:
    files = values["files"]
    models = {p.split("/")[1] for p in files if p.startswith(f"{MODELS}/")}
    for path, entry in files.items():
        parts = path.split("/")
        if path.startswith("/") or "\\" in path or any(part in ("", ".", "..") for part in parts):
            yield f"{path!r} leads out of the release"
        if len(str(entry["sha256"])) != 64 or int(entry["bytes"]) < 0:
            yield f"{path!r} has no SHA-256 or size"
    for model in sorted(models):
        if not NAME.fullmatch(model) or NUMBERED.search(model):
            yield f"{model!r} cannot be the name of a model"
        if f"{MODELS}/{model}/config.pbtxt" not in files:
            yield f"{model} has no config.pbtxt"
    if not values["classifiers"]:
        yield "it has no public model"
    for name, entry in values["classifiers"].items():
        if name not in models:
            yield f"the public model {name} is not below {MODELS}/"
        if entry["format"] not in values["formats"]:
            yield f"{name} is of a format {entry['format']!r} that it does not tell of"
    if f"{GOLDEN}/golden.json" not in files:
        yield "it has no golden examples, so that nothing could be checked"
    lines = sorted(
        f"{entry['sha256']}  {path}\n"
        for path, entry in files.items()
        if path.startswith((f"{MODELS}/", f"{GOLDEN}/"))
    )
    if values["release_id"] != hashlib.sha256("".join(lines).encode()).hexdigest()[:16]:
        yield "release_id does not belong to its files"


def _leads_out(path: Path, top: Path) -> bool:
    return any(
        step.is_symlink() for step in (path, *path.parents) if step.is_relative_to(top) and step != top
    )


def _copy(source: Path, target: Path | None) -> tuple[str, int]:
    """SHA-256 and size of a file, which is copied on the way. Raises ReleaseError if the copy cannot be written."""
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as stream:
        if target is None:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
            return digest.hexdigest(), size
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as copy:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
                    copy.write(chunk)
                copy.flush()
                os.fsync(copy.fileno())
        except OSError as error:
            raise ReleaseError(
                f"{target} cannot be written: {error.strerror}. Free space, or repair its permissions; nothing was "
                "changed on the server."
            ) from error
    return digest.hexdigest(), size
