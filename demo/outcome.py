"""Everything that a run of the demo found out, what of it goes into summary.json, and whether it is good
enough."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demo.parity import MAX_ABS_DIFF, Parity
from demo.scores import Scored, accuracy, auc
from demo.stages import Finished
from demo.triton_metrics import ModelCounts


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        synthetic: True if the slides were generated.
        recipe: name or path of the training recipe.
        source: "slides", or "tiles" where every image is one tile.
        slides, patients, centres: how many there are, those trained on included.
        manifest: the checkpoint's checkpoint.json.
        history: one entry an epoch, as training wrote it.
        export: the last line of the export.
        images: held-out images as the client answered them.
        held_out_patients: the same, by patient.
        parity: format -> served against PyTorch, every held-out tile.
        image_max_abs_diff: the client's answers against the mean of PyTorch's tiles.
        counts: what Triton counted for the requests of this run, its own proofs left out.
        heatmaps: image_id -> PNG.
        stages: what was run, in order.
        wall_s: seconds of the whole run.
        least_patient_auc: bar for `patient_auc`, None for no bar.
    """

    synthetic: bool
    recipe: str
    source: str
    slides: int
    patients: int
    centres: int
    manifest: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    export: Mapping[str, Any]
    images: Sequence[Scored]
    held_out_patients: Sequence[Scored]
    parity: Mapping[str, Parity]
    image_max_abs_diff: float
    counts: Sequence[ModelCounts]
    heatmaps: Mapping[str, Path]
    stages: Sequence[Finished]
    wall_s: float
    least_patient_auc: float | None

    @property
    def patient_auc(self) -> float | None:
        """ROC AUC of the served answers over held-out patients."""
        return auc(self.held_out_patients)

    @property
    def served(self) -> list[ModelCounts]:
        """Counts of the models that clients ask (the ensembles)."""
        asked = {parity.model for parity in self.parity.values()}
        return [counts for counts in self.counts if counts.model in asked]

    @property
    def problems(self) -> list[str]:
        """Why the run is not good enough; empty if it is."""
        problems = []
        for name, parity in self.parity.items():
            if not parity.holds:
                problems.append(
                    f"{name} ({parity.model}) does not match PyTorch: {parity.tiles} tiles, "
                    f"max |dp| {parity.max_abs_diff:.2e} (at most {MAX_ABS_DIFF:.0e}), "
                    f"{parity.label_mismatches} other labels"
                )
        if self.image_max_abs_diff > MAX_ABS_DIFF:
            problems.append(
                f"the client's answers differ from the mean of PyTorch's tiles by "
                f"{self.image_max_abs_diff:.2e} (at most {MAX_ABS_DIFF:.0e})"
            )
        failures = sum(counts.failures for counts in self.counts)
        if failures:
            problems.append(f"Triton counted {failures} failed requests; the server's log says why")
        if self.least_patient_auc is not None and (
            self.patient_auc is None or self.patient_auc < self.least_patient_auc
        ):
            found = "not defined" if self.patient_auc is None else f"{self.patient_auc:.3f}"
            problems.append(
                f"ROC AUC over held-out patients is {found}, expected at least {self.least_patient_auc:g}"
            )
        return problems

    def summary(self) -> dict[str, Any]:
        """The document of summary.json, JSON types."""
        requests = sum(counts.requests for counts in self.served)
        request_us = sum(counts.request_us for counts in self.served)
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "synthetic": self.synthetic,
            "recipe": self.recipe,
            "slides": self.slides,
            "patients": self.patients,
            "centres": self.centres,
            "classes": list(self.manifest["spec"]["class_names"]),
            "architecture": self.manifest["architecture"],
            "held_out_slides": len(self.images),
            "held_out_patients": len(self.held_out_patients),
            "patient_auc": self.patient_auc,
            "slide_auc": auc(self.images),
            "slide_accuracy": accuracy(self.images),
            "patient_accuracy": accuracy(self.held_out_patients),
            "training_metrics": {
                name: value if not isinstance(value, float) or math.isfinite(value) else None
                for name, value in self.manifest["metrics"].items()
            },
            "parity": {
                name: {
                    "model": parity.model,
                    "tiles": parity.tiles,
                    "max_abs_diff": parity.max_abs_diff,
                    "label_mismatches": parity.label_mismatches,
                }
                for name, parity in self.parity.items()
            },
            "slide_max_abs_diff": self.image_max_abs_diff,
            "served_requests": requests,
            "served_tiles": sum(counts.tiles for counts in self.served),
            "failed_requests": sum(counts.failures for counts in self.counts),
            "mean_request_ms": round(request_us / requests / 1000, 3) if requests else None,
            "stages_s": {stage.name: round(stage.wall_s, 2) for stage in self.stages},
            "wall_s": round(self.wall_s, 2),
        }
