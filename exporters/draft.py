"""The configurations of tile classifiers while they are being exported: staged one by one, published together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporters.acceptance import Acceptance
from exporters.cpu_layout import CpuLayout, cpu_layout, network_ms_of, preprocess_ms_of
from exporters.exported_format import REFUSED, ExportedFormat, exported_format, refused_format
from exporters.formats.interface import Artifact, ServedFormat
from exporters.network_work import network_work
from exporters.parity import Parity
from exporters.publication import Publication
from exporters.reference_profile import parameter_of
from exporters.serving_options import ServingOptions
from exporters.target_repository import (
    next_version,
    preprocess_version,
    read_config,
    refuse_to_strand,
    stage_preprocess,
)
from exporters.triton_config import (
    CLASSIFIER_MODEL,
    CONFIG_FILENAME,
    LABELS_FILENAME,
    PREPROCESS_MODEL,
    ModelConfig,
    classifier_config,
    labels_text,
    network_config,
    to_text,
)
from training.checkpoint import Checkpoint
from training.reference_profile import ReferenceProfile

__all__ = ["REFUSED", "Draft", "ExportedFormat", "ServingOptions", "exported_format", "refused_format"]

RELEASE_FILENAME = "release.json"
RELEASE_FORMAT = "clotline.release"
RELEASE_FORMAT_VERSION = 1


class Draft:
    """The configurations of tile classifiers, staged one by one.

    Attributes:
        version: of every network and ensemble.
        preprocess_version: of `tile_preprocess`.
    """

    def __init__(
        self,
        repository: Path,
        checkpoint: Checkpoint,
        options: ServingOptions,
        publication: Publication,
        formats: Sequence[ServedFormat],
        reference: ReferenceProfile | None = None,
    ) -> None:
        self.repository = repository
        self._reference = reference
        self.options = options
        self.publication = publication
        self.spec = checkpoint.spec
        self.manifest = checkpoint.manifest
        self.labels = labels_text(checkpoint.spec.class_names)
        self._work = network_work(checkpoint.model.backbone, self.spec.input_size_px)
        self.version = next_version(repository)
        self._networks: list[str] = []
        self._classifiers: list[str] = []
        exported = {fmt.model_name for fmt in formats}
        refuse_to_strand(repository, exported, self.spec.input_size_px, options.max_batch)
        self.preprocess_version = preprocess_version(repository)

    def path_of(self, fmt: ServedFormat, filename: str) -> str:
        """Where a file of a format's artefact belongs, inside the repository."""
        return f"{fmt.model_name}/{self.version}/{filename}"

    def add(
        self,
        fmt: ServedFormat,
        artifact: Artifact,
        measured: Parity | None,
        acceptance: Acceptance,
        *,
        first: bool,
    ) -> ExportedFormat:
        """Stage the configuration of a network, and of the ensembles that answer with it."""
        classifiers = [CLASSIFIER_MODEL] if first else []
        of_its_own = fmt.classifier_name
        # An ensemble of an earlier export is pinned anew, lest it point to a version that is no longer loaded.
        if not first or (self.repository / of_its_own).exists():
            classifiers.append(of_its_own)
        layout = self._layout(fmt, artifact, first=first)
        if first:
            stage_preprocess(
                self.publication,
                self.repository,
                self.spec.input_size_px,
                self.options,
                layout.preprocess_instances,
            )
        network = self._network_config(fmt, layout, answers_for=classifiers[0])
        self._stage_model(network)
        self._networks.append(network.name)
        exported = exported_format(fmt, artifact, measured, acceptance, classifiers)
        origin = {
            "weights_sha256": self.manifest["weights_sha256"],
            "git_commit": self.manifest.get("git_commit"),
            "architecture": self.manifest["architecture"],
            "format": fmt.name,
        }
        parameters = {"clotline_spec": self.spec.to_json(), "clotline_checkpoint": _compact(origin)}
        if acceptance.reasons:
            parameters["clotline_unproven"] = "; ".join(acceptance.reasons)
        for name in classifiers:
            watched = parameter_of(self._reference, "tiles", with_appearance=name == CLASSIFIER_MODEL)
            config = classifier_config(
                name,
                network=network,
                tensors=fmt.tensors,
                network_version=self.version,
                preprocess_version=self.preprocess_version,
                parameters={**parameters, **watched},
            )
            self._stage_model(config)
            # Triton wants the version directory of an ensemble to exist; copies to where empty directories
            # are lost (git, object stores) keep one that holds a file.
            self.publication.stage(
                f"{name}/{self.version}/{RELEASE_FILENAME}", self._release_json(origin, exported).encode()
            )
            self._classifiers.append(name)
        return exported

    def withdraw(self, exported: ExportedFormat) -> None:
        """Forget a network and the ensembles that answer with it."""
        for model in (exported.model, *exported.classifiers):
            self.publication.withdraw(model)
        self._networks = [name for name in self._networks if name != exported.model]
        self._classifiers = [name for name in self._classifiers if name not in exported.classifiers]

    def models_in_order(self) -> list[str]:
        """Networks, then preprocessing, then ensembles, `tile_classifier` last: each after what it refers to."""
        ensembles = sorted(self._classifiers, key=lambda name: name == CLASSIFIER_MODEL)
        return [*self._networks, PREPROCESS_MODEL, *ensembles]

    def _layout(self, fmt: ServedFormat, artifact: Artifact, *, first: bool) -> CpuLayout:
        """Of the first format by what it computes; the others are there to be compared with."""
        cores = self.options.instances if first else 1
        if self.options.instance_kind != "cpu":
            return cpu_layout(cores, None, 0.0, artifact.size_bytes)
        network_ms = network_ms_of(self._work, fmt.precision)
        return cpu_layout(cores, network_ms, preprocess_ms_of(self.spec), artifact.size_bytes)

    def _network_config(self, fmt: ServedFormat, layout: CpuLayout, *, answers_for: str) -> ModelConfig:
        def build(versions_loaded: int) -> ModelConfig:
            return network_config(
                fmt.model_name,
                backend=fmt.backend,
                platform=fmt.platform,
                artifact_filename=fmt.artifact_filename,
                tensors=fmt.tensors,
                parameters=layout.parameters(fmt.parameters),
                input_size_px=self.spec.input_size_px,
                classes=len(self.spec.class_names),
                max_batch=self.options.max_batch,
                instances=layout.instances,
                instance_kind=self.options.instance_kind,
                versions_loaded=versions_loaded,
                answers_for=(answers_for, self.spec.class_names),
                gathered=layout.gathered,
            )

        new = build(self.options.versions_loaded)
        old = read_config(self.repository / fmt.model_name)
        if old is None or (list(old.input) == list(new.input) and list(old.output) == list(new.output)):
            return new
        return build(1)  # a model has one configuration: it cannot describe the version before as well

    def _stage_model(self, config: ModelConfig) -> None:
        self.publication.stage(f"{config.name}/{CONFIG_FILENAME}", to_text(config).encode())
        self.publication.stage(f"{config.name}/{LABELS_FILENAME}", self.labels.encode())

    def _release_json(self, origin: Mapping[str, Any], exported: ExportedFormat) -> str:
        """What stands beside an ensemble: nothing that differs from one export of a checkpoint to the next."""
        acceptance = dataclasses.asdict(exported.acceptance)
        del acceptance["speed"]
        return _compact(
            {
                "format": RELEASE_FORMAT,
                "version": RELEASE_FORMAT_VERSION,
                "release": self.version,
                "network": exported.model,
                "artifact_sha256": exported.artifact_sha256,
                "files": dict(exported.files),
                "checkpoint": origin,
                "parity": dataclasses.asdict(exported.parity) if exported.parity is not None else None,
                "acceptance": acceptance,
                "notes": exported.notes,
            }
        )


def _compact(document: Mapping[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
