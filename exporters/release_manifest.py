"""release.json: what a release is, where it comes from, how well it answers, and the SHA-256 of each of its files.

    DIR/release.json        this manifest
    DIR/MODEL_CARD.md       written from it
    DIR/models/             a complete Triton model repository
    DIR/golden/             golden.json and the encoded tiles that PyTorch's answers belong to
    DIR/plots/              pictures

Readers that cannot import this package read the file as plain JSON; `docs/releases.md` tells the keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from exporters.errors import ReleaseError, ReleaseVersionError
from training.reference_profile import ReferenceProfile

FORMAT = "clotline.release"
VERSION = 2
MANIFEST_NAME = "release.json"
CARD_NAME = "MODEL_CARD.md"
MODELS, GOLDEN, PLOTS = "models", "golden", "plots"
REFERENCE_PLOT = f"{PLOTS}/reference_profile.png"

Sha256 = Annotated[str, pydantic.StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, pydantic.StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$")]
Size = Annotated[int, pydantic.Field(ge=0)]


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FileEntry(_Model):
    """A file of the release."""

    sha256: Sha256
    bytes: Size


class FormatParity(_Model):
    """How closely a format follows PyTorch.

    Attributes:
        in_process: the figures of `exporters.parity`, JSON types; None where it does not run on the machine that
            exported it.
        served: the figures through a real tritonserver, "http" and "grpc"; None where that was not asked.
        not_served_because: why `served` is None.
    """

    in_process: dict[str, Any] | None
    served: dict[str, Any] | None
    not_served_because: str | None = None


class FormatEntry(_Model):
    """One format of a release.

    Attributes:
        model: the Triton model that holds the network; of a slide model, the encoder.
        classifiers: public models that answer with it; none where it is not published.
        precision: row of `exporters.tolerances`.
        status: refused formats are told of, and are not below models/.
        reasons: why it is unproven or refused.
        bytes: of its files together.
        files: name in the version directory of `model` -> SHA-256; a file of another model is named "<model>/<file>".
            Empty where it could not be built.
        speed: `exporters.acceptance.Speed` and "ratio", JSON types; None where it was not timed.
        notes: how it was made.
    """

    model: Name
    classifiers: list[Name]
    precision: str
    status: Literal["accepted", "unproven", "refused"]
    reasons: list[str]
    bytes: Size
    files: dict[str, Sha256]
    parity: FormatParity
    speed: dict[str, Any] | None
    notes: dict[str, Any]


class ClassifierEntry(_Model):
    """A public model.

    Attributes:
        format: that its networks have.
        network: the Triton model that a tile classifier answers with.
        parts: role -> Triton model, of any other public model.
        served: figures through a real tritonserver, where they are not those of the format: of a tile checkpoint's
            `slide_classifier`.
    """

    format: str
    network: Name | None = None
    parts: dict[str, Any] | None = None
    served: dict[str, Any] | None = None


class Manifest(_Model):
    """release.json without its checksum. Keys are explained in docs/releases.md."""

    format: Literal["clotline.release"] = "clotline.release"
    version: Literal[2] = 2
    kind: Literal["tile", "slide", "ensemble"]
    release_id: Annotated[str, pydantic.StringConstraints(pattern=r"^[0-9a-f]{16}$")]
    classifiers: dict[Name, ClassifierEntry]
    formats: dict[str, FormatEntry]
    spec: dict[str, Any]
    checkpoint: dict[str, Any]
    mlflow: dict[str, Any] | None
    pretrained: dict[str, Any] | None
    git_commit: str
    git_dirty: bool
    versions: dict[str, str]
    onnx: dict[str, int] | None
    tolerances: dict[str, dict[str, Any]]
    reference: ReferenceProfile | None = None
    machine: dict[str, Any]
    created_utc: str
    files: dict[str, FileEntry]

    @pydantic.model_validator(mode="after")
    def _adds_up(self) -> Manifest:
        problems = [
            f"files has {path!r}, which leads out of the release" for path in self.files if _escapes(path)
        ]
        problems += [f"files has {MANIFEST_NAME}, which cannot hold its own SHA-256"] * (
            MANIFEST_NAME in self.files
        )
        problems += [
            f"classifiers.{name} has format {entry.format!r}, which is not among formats"
            for name, entry in self.classifiers.items()
            if entry.format not in self.formats
        ]
        problems += [
            f"formats.{name} is refused and has classifiers"
            for name, entry in self.formats.items()
            if entry.status == "refused" and entry.classifiers
        ]
        if not problems and self.release_id != release_id(self.digests()):
            problems.append("release_id does not belong to the files below models/ and golden/")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def digests(self) -> dict[str, str]:
        """Path -> SHA-256 of every file of the release but the manifest."""
        return {path: entry.sha256 for path, entry in self.files.items()}

    def as_dict(self) -> dict[str, Any]:
        """JSON types, as in the file but for its checksum."""
        return self.model_dump(mode="json")


def release_id(digests: Mapping[str, str]) -> str:
    """The first 16 digits of the SHA-256 over the sorted lines "<sha256>  <path>" of all below models/ and golden/."""
    lines = sorted(
        f"{sha256}  {path}\n"
        for path, sha256 in digests.items()
        if path.startswith((f"{MODELS}/", f"{GOLDEN}/"))
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def to_text(manifest: Manifest) -> str:
    """The content of release.json."""
    values = manifest.as_dict()
    return (
        json.dumps(
            {**values, "sha256": checksum(values)},
            indent=1,
            sort_keys=True,
            ensure_ascii=False,
            allow_nan=False,
        )
        + "\n"
    )


def checksum(values: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its "sha256", as JSON with sorted keys (json.dumps with sort_keys=True)."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def entries_of(root: Path) -> dict[str, FileEntry]:
    """Path below `root` -> size and SHA-256, of every file but the manifest."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and name != MANIFEST_NAME:
            found[name] = file_entry(path)
    return found


def file_entry(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
        return FileEntry(sha256=digest.hexdigest(), bytes=stream.tell())


def load(path: Path | str) -> Manifest:
    """Read the manifest of a release.

    Args:
        path: the release's directory, or its release.json.

    Raises:
        ReleaseVersionError: it is no release, or one of a version that this code does not read.
        ReleaseError: the manifest is missing or damaged, was altered, or does not make sense; every problem is listed.
    """
    path = Path(path)
    if path.name != MANIFEST_NAME:
        path = path / MANIFEST_NAME
    values = read(path)
    problems = []
    if values.pop("sha256", None) != checksum(values):
        problems.append("it was altered after it was written (its sha256 differs); export again")
    try:
        manifest = Manifest.model_validate(values)
    except pydantic.ValidationError as error:
        problems += [_in_words(entry) for entry in error.errors()]
    if problems:
        raise ReleaseError(f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}", problems)
    return manifest


def read(path: Path) -> dict[str, Any]:
    """A manifest's JSON, checked for format and version only; raises as `load`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ReleaseVersionError(
            f"{path} is missing: {path.parent} is no release. `python -m exporters export CHECKPOINT --release DIR` "
            "writes one."
        ) from None
    except (OSError, ValueError) as error:
        raise ReleaseError(
            f"{path} cannot be read as JSON: {error}. Export again, or copy the release again."
        ) from error
    found = values.get("format") if isinstance(values, dict) else type(values).__name__
    if found != FORMAT:
        raise ReleaseVersionError(
            f"{path} has format {found!r}, not {FORMAT!r}: it is no release of Clotline."
        )
    if values.get("version") != VERSION:
        raise ReleaseVersionError(
            f"{path} has version {values.get('version')!r}, this Clotline reads version {VERSION}. Use the Clotline "
            "that wrote it, or export again."
        )
    return dict(values)


def _escapes(path: str) -> bool:
    parts = path.split("/")
    return path.startswith("/") or "\\" in path or any(part in ("", ".", "..") for part in parts)


def _in_words(error: Mapping[str, Any]) -> str:
    where = ".".join(map(str, error["loc"]))
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
