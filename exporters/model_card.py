"""MODEL_CARD.md: what a release is and how far it can be trusted, for people, written from the manifest alone.

Sections follow Mitchell et al., "Model Cards for Model Reporting" (FAT* 2019, https://arxiv.org/abs/1810.03993), with
Hugging Face's names of them (https://huggingface.co/docs/hub/model-card-annotated).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from exporters.release_manifest import REFERENCE_PLOT, Manifest
from training.reference_profile import ReferenceProfile

_TEMPLATE = "model_card.md.j2"
_FIRST = ("tile_classifier", "slide_classifier")
_MEANING = {
    "auc": "area under the ROC curve",
    "log_loss": "log loss, classes weighted equally; 0 is best, ln(classes) is a guess",
    "accuracy": "share of right answers",
    "brier": "mean squared distance from the truth; 0 is best",
}


def render(manifest: Manifest) -> str:
    """The card as Markdown; two manifests that are equal give the same card."""
    # Markdown, not HTML: what is printed is escaped by _printed.
    environment = jinja2.Environment(  # nosec B701
        loader=jinja2.PackageLoader("exporters", "."),
        autoescape=False,  # noqa: S701
        undefined=jinja2.StrictUndefined,
        finalize=_printed,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["figure"] = _figure
    environment.filters["megabytes"] = lambda count: f"{count / 1e6:.1f}"
    classifiers = dict(
        sorted(manifest.classifiers.items(), key=lambda item: (item[0] not in _FIRST, item[0]))
    )
    first = next(iter(classifiers.values())).format
    formats = dict(sorted(manifest.formats.items(), key=lambda item: (item[0] != first, item[0])))
    published = {name: entry for name, entry in formats.items() if entry.classifiers}
    members = manifest.checkpoint.get("members", [])
    unserved = sorted({entry.parity.not_served_because for entry in published.values()} - {None}, key=str)
    return environment.get_template(_TEMPLATE).render(
        m=manifest,
        classes=manifest.spec["class_names"],
        data=manifest.checkpoint.get("data", members[0].get("data", {}) if members else {}),
        members=members,
        learnt_from=[
            (entry.get("name"), entry.get("data", {})) for entry in members or [manifest.checkpoint]
        ],
        pretrained=_pretrained(manifest),
        metrics=[(name, value, _meaning(name)) for name, value in sorted(_metrics(manifest).items())],
        classifiers=classifiers,
        formats=formats,
        listed={name: entry for name, entry in formats.items() if not entry.classifiers},
        unserved=unserved,
        plots=sorted(path for path in manifest.files if path.startswith("plots/") and path != REFERENCE_PLOT),
        reference=_reference(manifest.reference),
        reference_plot=REFERENCE_PLOT if REFERENCE_PLOT in manifest.files else None,
        worst=_worst,
    )


def _metrics(manifest: Manifest) -> dict[str, float]:
    found: Mapping[str, Any] = manifest.checkpoint.get("metrics", {})
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def _pretrained(manifest: Manifest) -> dict[str, Any]:
    """Network -> origin of its weights; the only one of a checkpoint has its architecture for a name."""
    told = manifest.pretrained or {}
    if not told or "members" in told:
        return dict(told.get("members", {}))
    return {str(manifest.checkpoint.get("architecture", "network")): told}


def _meaning(name: str) -> str:
    return next((text for ending, text in _MEANING.items() if name.endswith(ending)), "")


def _reference(profile: ReferenceProfile | None) -> list[tuple[str, str, int, int]]:
    """What, how it is distributed, how many, of how many patients."""
    if profile is None:
        return []
    rows = []
    for name, answers in (("tiles", profile.tiles), ("slides", profile.slides)):
        if answers is not None:
            size = (answers.count, answers.patients)
            shares = ", ".join(
                f"{label} {sum(counts) / answers.count:.1%}"
                for label, counts in sorted(answers.confidence.items())
            )
            rows.append((f"class of {name}", shares, *size))
            rows.append(
                (f"confidence of {name}", _quantiles(answers.together, profile.confidence_edges), *size)
            )
    if profile.appearance is not None:
        size = (profile.appearance.count, profile.appearance.patients)
        rows += [
            (name.replace("_", " "), _quantiles(counts, profile.appearance_edges[name]), *size)
            for name, counts in sorted(profile.appearance.statistics.items())
        ]
    return rows


def _quantiles(counts: Sequence[int], edges: Sequence[float]) -> str:
    """Upper edges of the buckets that hold the 10th, 50th and 90th percentile."""
    reached = list(itertools.accumulate(counts))
    found = (
        next(place for place, held in enumerate(reached) if held >= q * reached[-1]) for q in (0.1, 0.5, 0.9)
    )
    told = [f"{edges[place]:g}" if place < len(edges) else f"> {edges[-1]:g}" for place in found]
    return " / ".join(told)


def _worst(parity: Any) -> dict[str, Any]:
    """The largest difference and the most flips over this process and both protocols."""
    seen = [
        figures
        for figures in (parity.in_process, *((parity.served or {}).get(name) for name in ("http", "grpc")))
        if isinstance(figures, Mapping) and figures.get("max_abs_diff") is not None
    ]
    if not seen:
        return {}
    return {
        "max_abs_diff": max(figures["max_abs_diff"] for figures in seen),
        "label_flips": max(figures.get("label_flips") or 0 for figures in seen),
        "tiles": seen[0].get("tiles"),
        "batches": seen[0].get("batches"),
    }


def _figure(value: Any, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _printed(value: Any) -> Any:
    """Text that cannot break out of a table's cell or become HTML."""
    if not isinstance(value, str):
        return value
    return " ".join(value.replace("|", "\\|").replace("<", "&lt;").split("\n"))
