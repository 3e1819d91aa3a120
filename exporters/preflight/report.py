"""The whole answer of preflight: for people, and as JSON."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.preflight.findings import DOES_NOT_LOAD, LOADS, NOTE, UNKNOWN
from exporters.preflight.repository import ModelReport, counts, inspect, writers_of
from exporters.preflight.table import EMBEDDED, Container, container, nearest_tags

_FACTS = (
    "triton",
    "onnxruntime",
    "openvino",
    "pytorch",
    "tensorrt",
    "python",
    "cuda",
    "driver",
    "compute_capability",
)
_MARKS = {LOADS: "loads", DOES_NOT_LOAD: "DOES NOT LOAD", UNKNOWN: "unknown"}
_WIDEST = 150


@dataclass(frozen=True)
class Report:
    """What preflight says.

    Attributes:
        directory: what was looked at.
        container: where it is to load.
        models: a report a version of a model, by name.
    """

    directory: Path
    container: Container
    models: list[ModelReport]

    @property
    def fails(self) -> bool:
        """Whether something does not load."""
        return any(model.verdict == DOES_NOT_LOAD for model in self.models)

    @property
    def leaves_open(self) -> bool:
        """Whether something is unknown."""
        return any(model.verdict == UNKNOWN for model in self.models)


def preflight(directory: Path | str, tag: str, *, adds: frozenset[str] = frozenset()) -> Report:
    """Whether each model would load.

    Args:
        directory: a release, or a Triton model repository.
        tag: of the container, or "embedded".
        adds: Python modules that the user's image has beside the container's own.

    Raises:
        FormatError: no such container, or no embedded server.
        ReleaseVersionError: no release and no model repository.
    """
    directory = Path(directory)
    if tag == EMBEDDED:
        from exporters.preflight.embedded import embedded_server

        chosen = embedded_server()
    else:
        chosen = container(tag)
    models = directory / "models" if (directory / "release.json").is_file() else directory
    return Report(directory, chosen, inspect(models, chosen, written_by=writers_of(directory), adds=adds))


def as_json(report: Report) -> dict[str, Any]:
    """JSON types; every finding with its source, every fact of the container, null where it is not known."""
    here = report.container
    return {
        "directory": str(report.directory),
        "container": here.tag,
        "variant": here.variant or None,
        "listed": here.listed,
        "nearest": [] if here.listed else nearest_tags(here.tag),
        "facts": {
            name: {"version": fact.value, "source": fact.source} if (fact := here.facts.get(name)) else None
            for name in _FACTS
        },
        "counts": counts(report.models),
        "models": [
            {
                "model": model.model,
                "version": model.version,
                "backend": model.backend,
                "file": model.file or None,
                "verdict": model.verdict,
                "findings": [
                    {"kind": finding.kind, "text": finding.text, "source": finding.source or None}
                    for finding in model.findings
                ],
                "about": model.about,
                "largest_request_bytes": model.largest_request_bytes,
            }
            for model in report.models
        ],
    }


def as_text(report: Report) -> str:
    """A table of models, why below each that does not surely load, and notes at the end."""
    here = report.container
    known = [f"{name} {here.said(name)}" for name in _FACTS if name in here.facts]
    between = [
        f"{name} {here.said(name)}"
        for name in _FACTS
        if name not in here.facts and here.said(name) != UNKNOWN
    ]
    missing = [name for name in _FACTS if here.said(name) == UNKNOWN]
    width = min(shutil.get_terminal_size((120, 24)).columns, _WIDEST)
    lines = [f"{report.directory} in {here.name}"]
    if not here.listed:
        lines.append(f"  {here.tag} is not in the table; the nearest are {', '.join(nearest_tags(here.tag))}")
    lines += textwrap.wrap(", ".join(known), width, initial_indent="  has ", subsequent_indent="      ")
    lines += textwrap.wrap(
        ", ".join(between), width, initial_indent="  by its neighbours: ", subsequent_indent="      "
    )
    if missing and not here.is_embedded:
        lines += textwrap.wrap(
            ", ".join(missing), width, initial_indent="  unknown there: ", subsequent_indent="      "
        )
    names = [f"{model.model} {model.version}" if model.version else model.model for model in report.models]
    column = max(map(len, names))
    for name, model in zip(names, report.models, strict=True):
        lines.append(f"  {name:<{column}}  {model.backend or '?':<12} {_MARKS[model.verdict]}")
        for finding in model.findings:
            if finding.kind != NOTE:
                lines += textwrap.wrap(
                    finding.text, width, initial_indent="      ", subsequent_indent="        "
                )
    for text, of in _notes(report).items():
        words = f"{text} ({', '.join(of)})"
        lines += textwrap.wrap(words, width, initial_indent="  note: ", subsequent_indent="        ")
    found = counts(report.models)
    lines.append(f"  {found[LOADS]} load, {found[DOES_NOT_LOAD]} do not, {found[UNKNOWN]} unknown")
    return "\n".join(lines)


def _notes(report: Report) -> dict[str, list[str]]:
    """What is worth saying of models that load all the same -> the models that it is said of."""
    found: dict[str, list[str]] = {}
    for model in report.models:
        for finding in model.findings:
            if finding.kind == NOTE and model.model not in found.setdefault(finding.text, []):
                found[finding.text].append(model.model)
    return found
