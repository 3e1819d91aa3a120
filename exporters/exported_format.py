"""What an export says of one format: built, proven, and published or refused."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from exporters.acceptance import Acceptance
from exporters.errors import ExportError, ParityError
from exporters.formats.interface import Artifact, ServedFormat
from exporters.parity import Parity

REFUSED = "refused"
_NOTHING = " Nothing was published."


@dataclasses.dataclass(frozen=True)
class ExportedFormat:
    """One network of a release.

    Attributes:
        model: the Triton model that holds it.
        classifiers: the public models that answer with it; none where it was not published.
        artifact_bytes: size of its files; 0 where it could not be built.
        artifact_sha256: of the file that the backend looks for; "" where it could not be built.
        parity: how closely it follows PyTorch; None where it cannot run on this machine or was refused before.
        acceptance: whether it is accepted, unproven or refused, why, and how fast.
        notes: how it was made.
        precision: row of `exporters.tolerances`.
        files: name in the version directory -> SHA-256.
        served: "http" and "grpc" -> how closely it follows PyTorch through a tritonserver; None where not asked.
    """

    model: str
    classifiers: tuple[str, ...]
    artifact_bytes: int
    artifact_sha256: str
    parity: Parity | None
    acceptance: Acceptance
    notes: Mapping[str, Any]
    precision: str = "fp32"
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    served: Mapping[str, Any] | None = None


def exported_format(
    fmt: ServedFormat,
    artifact: Artifact,
    measured: Parity | None,
    acceptance: Acceptance,
    classifiers: Sequence[str] = (),
) -> ExportedFormat:
    """What is said of a format in the release; without classifiers it was not published."""
    files = {name: sha256(content) for name, content in sorted(artifact.files.items())}
    return ExportedFormat(
        model=fmt.model_name,
        classifiers=tuple(classifiers),
        artifact_bytes=artifact.size_bytes,
        artifact_sha256=files[fmt.artifact_filename],
        parity=measured,
        acceptance=acceptance,
        notes=_with_onnx_target(artifact),
        precision=fmt.precision,
        files=files,
    )


def refused_format(fmt: ServedFormat, artifact: Artifact | None, error: ExportError) -> ExportedFormat:
    """A format that is listed with its figures and not published.

    Args:
        artifact: what was built; None where building failed.
        error: why it is refused, and what was measured until then.
    """
    measured = error.measured if isinstance(error, ParityError) else None
    speed = error.speed if isinstance(error, ParityError) else None
    acceptance = Acceptance(REFUSED, (str(error).removesuffix(_NOTHING),), speed)
    if artifact is not None:
        return exported_format(fmt, artifact, measured, acceptance)
    return ExportedFormat(fmt.model_name, (), 0, "", measured, acceptance, {}, fmt.precision)


def refused_when_served(exported: ExportedFormat, error: ExportError) -> ExportedFormat:
    """A format that passed in this process and failed through a tritonserver; its figures here are kept."""
    reason = str(error).removesuffix(_NOTHING)
    acceptance = dataclasses.replace(exported.acceptance, status=REFUSED, reasons=(reason,))
    return dataclasses.replace(exported, classifiers=(), acceptance=acceptance, served=None)


def sha256(content: bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _with_onnx_target(artifact: Artifact) -> dict[str, Any]:
    """The notes of an artefact; those of an ONNX file tell its opset and IR version, which decide where it loads."""
    notes = dict(artifact.notes)
    for name, content in artifact.files.items():
        if name.endswith(".onnx"):
            import onnx

            model = onnx.load_from_string(content)
            opsets = {entry.domain: entry.version for entry in model.opset_import}
            notes["onnx"] = {
                "opset": opsets.get("", opsets.get("ai.onnx", 0)),
                "ir_version": model.ir_version,
            }
    return notes
