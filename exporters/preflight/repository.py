"""A model repository, model by model: configuration, versions, files, and what models need of each other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporters.errors import ReleaseVersionError
from exporters.preflight import table
from exporters.preflight.configuration import ENSEMBLE, Model, read
from exporters.preflight.files import UnreadableError
from exporters.preflight.findings import DOES_NOT_LOAD, LOADS, UNKNOWN, Finding, blocks, unknown, verdict
from exporters.preflight.request_size import http_note, largest_request_bytes
from exporters.preflight.runtimes import RUNTIMES, Question
from exporters.preflight.table import Container
from exporters.triton_config import CONFIG_FILENAME

_FILE_OF_BACKEND = {
    "onnxruntime": "model.onnx",
    "pytorch": "model.pt",
    "tensorrt": "model.plan",
    "openvino": "model.xml",
    "python": "model.py",
}


@dataclass
class ModelReport:
    """What preflight says of one version of a model.

    Attributes:
        model: its name.
        version: of the directory; 0 where there is none.
        backend: "" where it is not known.
        file: name in the version directory; "" for an ensemble.
        about: facts of the file (JSON types).
        findings: see `Finding`.
        largest_request_bytes: of one request with a full batch; None where nothing bounds it.
    """

    model: str
    version: int
    backend: str
    file: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    largest_request_bytes: int | None = None

    @property
    def verdict(self) -> str:
        """LOADS, DOES_NOT_LOAD or UNKNOWN."""
        return verdict(self.findings)


def inspect(
    models: Path, container: Container, *, written_by: Mapping[str, str], adds: frozenset[str] = frozenset()
) -> list[ModelReport]:
    """Every version of every model that a server would load.

    Args:
        models: a Triton model repository.
        container: where it is to load.
        written_by: "torch", "openvino" ... -> version that wrote the files.
        adds: Python modules that the user's image has beside the container's own.

    Raises:
        ReleaseVersionError: no directory, or no model in it.
    """
    try:
        entries = sorted(
            entry for entry in models.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
    except OSError as error:
        raise ReleaseVersionError(
            f"{models} cannot be read as a model repository: {error.strerror}."
        ) from error
    if not any((entry / CONFIG_FILENAME).is_file() for entry in entries):
        raise ReleaseVersionError(
            f"{models} holds no Triton model (a directory with {CONFIG_FILENAME}). Name a release or a model repository."
        )
    known = {entry.name: read(entry, container) for entry in entries}
    writers = _writers(models, known)
    reports = [
        report
        for name, model in known.items()
        for report in _versions_of(model, container, {**writers.get(name, {}), **written_by}, adds)
    ]
    _look_at_parts(known, reports)
    asked = {name for model in known.values() for name, _ in model.parts}
    for report in reports:
        if not container.listed:
            nearest = ", ".join(table.nearest_tags(container.tag))
            report.findings.append(
                unknown(f"{container.tag} is not in the table of containers (nearest: {nearest})")
            )
        report.largest_request_bytes = largest_request_bytes(known[report.model], known)
        too_large = http_note(report.largest_request_bytes)
        public = report.model not in asked or known[report.model].is_public
        if too_large is not None and public and report.verdict != DOES_NOT_LOAD:
            report.findings.append(too_large)
    return reports


def writers_of(release: Path) -> dict[str, str]:
    """ "versions" of a release's manifest; empty where there is none.

    Raises:
        ReleaseVersionError: it is there and cannot be read.
    """
    manifest = release / "release.json"
    if not manifest.is_file():
        return {}
    try:
        versions = json.loads(manifest.read_text("utf-8"))["versions"]
        return {str(name): str(version) for name, version in versions.items() if version}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReleaseVersionError(
            f"{manifest} is not the manifest of a release ({type(error).__name__}: {error}). Look at the models alone: "
            f"name {release / 'models'}."
        ) from error


def _writers(models: Path, known: Mapping[str, Model]) -> dict[str, dict[str, str]]:
    """Network -> what wrote it, of what an export notes beside the ensembles that answer with it."""
    found: dict[str, dict[str, str]] = {}
    for name in known:
        for file in sorted((models / name).glob("*/release.json")):
            try:
                beside = json.loads(file.read_text("utf-8"))
                torch = beside["notes"].get("torch")
                if torch:
                    found[str(beside["network"])] = {"torch": str(torch)}
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue  # it only makes something unknown
    return found


def _versions_of(
    model: Model, container: Container, written_by: Mapping[str, str], adds: frozenset[str]
) -> Iterator[ModelReport]:
    if model.config is None:
        yield ModelReport(model.name, 0, model.backend, findings=list(model.findings))
        return
    there = sorted(
        int(entry.name) for entry in model.directory.iterdir() if entry.is_dir() and entry.name.isdigit()
    )
    policy = model.config.version_policy
    if policy.HasField("specific"):
        chosen = sorted(policy.specific.versions)
    elif policy.HasField("all"):
        chosen = there
    else:
        chosen = there[-max(1, policy.latest.num_versions) :]
    if not chosen:
        findings = [
            *model.findings,
            blocks("it has no version directory (such as 1): copy it, or export again"),
        ]
        yield ModelReport(model.name, 0, model.backend, findings=findings)
    for version in chosen:
        yield _look_at_version(model, version, container, written_by, adds)


def _look_at_version(
    model: Model, version: int, container: Container, written_by: Mapping[str, str], adds: frozenset[str]
) -> ModelReport:
    report = ModelReport(model.name, version, model.backend, findings=list(model.findings))
    directory = model.directory / str(version)
    if not directory.is_dir():
        report.findings.append(blocks(f"its version policy names {version}, and there is no such directory"))
        return report
    if model.backend == ENSEMBLE or report.verdict == DOES_NOT_LOAD:
        return report
    aoti = model.config.platform == "torch_aoti"
    usual = "model.pt2" if aoti else _FILE_OF_BACKEND.get(model.backend, "")
    report.file = model.config.default_model_filename or usual
    look = RUNTIMES.get(model.backend)
    if look is None:
        if model.backend:
            report.findings.append(unknown(f"files of the backend {model.backend!r} are not looked into"))
        return report
    path = directory / report.file
    if path.is_dir():
        report.findings.append(unknown(f"{report.file} is a directory, which is not looked into"))
    elif not path.is_file():
        report.findings.append(
            blocks(f"{report.file} is missing in version {version}: copy it, or export again")
        )
    else:
        try:
            report.about, found = look(Question(path, model.config, container, written_by, adds))
            report.findings += found
        except UnreadableError as error:
            report.findings.append(blocks(f"{report.file} {error}: copy it again, or export again"))
        except OSError as error:
            report.findings.append(unknown(f"{report.file} cannot be read: {error.strerror}"))
    return report


def _look_at_parts(known: Mapping[str, Model], reports: list[ModelReport]) -> None:
    """Whoever asks a model that does not load, does not load either; chains are followed."""
    by_version = {(report.model, report.version): report for report in reports}
    newest = {report.model: report for report in sorted(reports, key=lambda report: report.version)}
    for _ in known:
        changed = False
        for report in reports:
            for name, version in known[report.model].parts:
                part = by_version.get((name, version)) if version is not None else newest.get(name)
                found = _finding_of_part(name, version, part, known)
                if found is not None and found not in report.findings:
                    report.findings.append(found)
                    changed = True
        if not changed:
            return


def _finding_of_part(
    name: str, version: int | None, part: ModelReport | None, known: Mapping[str, Model]
) -> Finding | None:
    which = name if version is None else f"{name} version {version}"
    if part is None:
        return blocks(
            f"it needs {which}, which is not loaded"
            if name in known
            else f"it needs {which}, which is missing"
        )
    if part.verdict == DOES_NOT_LOAD:
        return blocks(f"it needs {which}, which does not load")
    return unknown(f"it needs {which}, of which it is unknown") if part.verdict == UNKNOWN else None


def counts(reports: list[ModelReport]) -> dict[str, int]:
    """Verdict -> models."""
    return {
        kind: sum(report.verdict == kind for report in reports) for kind in (LOADS, DOES_NOT_LOAD, UNKNOWN)
    }
