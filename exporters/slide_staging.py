"""A slide checkpoint, or an ensemble of them, as `slide_classifier`: what `exporters.slide` drafts, staged and proven."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exporters.errors import ParityError, ServedError
from exporters.exported_format import ExportedFormat, refused_when_served
from exporters.proving_server import proving_server, unservable_here
from exporters.publication import Publication
from exporters.slide.export import SlideDraft, check_slides_on, draft_slides
from exporters.staging import Request, Staging
from exporters.target_repository import (
    next_version,
    preprocess_version,
    refuse_to_strand,
    stage_preprocess,
)
from exporters.triton_config import PREPROCESS_MODEL


class SlideStaging(Staging):
    """See the module and `Staging`."""

    def __init__(
        self, request: Request, repository: Path, publication: Publication, announce: Callable[[str], object]
    ) -> None:
        self._publication, self._request = publication, request
        self.version = next_version(repository)
        self._draft: SlideDraft = draft_slides(
            request.source,
            request.formats,
            request.options,
            version=self.version,
            preprocess_version=preprocess_version(repository),
            calibration_source=request.calibration_source,
            bags_source=request.tiles_source,
            publish_unproven=request.publish_unproven,
            keep_refused=request.keep_refused,
            unservable=unservable_here if request.served else lambda fmt: None,
            onnx_target=request.onnx_target,
            announce=announce,
        )
        self.kind = self._draft.kind
        self.spec = self._draft.spec
        self.golden = self._draft.golden
        self.layer_sources = self._draft.layer_sources
        self.reference = self._draft.profile
        size_px = self.spec.input_size_px
        refuse_to_strand(repository, set(self._draft.models), size_px, request.options.max_batch)
        stage_preprocess(publication, repository, size_px, request.options)
        for path, content in self._draft.files.items():
            publication.stage(path, content)
        self.formats: dict[str, ExportedFormat] = {}
        for name, exported in self._draft.formats.items():
            prefix = f"{exported.model}/{self.version}/"
            files = {
                path.removeprefix(prefix): digest
                for path, digest in self._draft.files_of.get(name, exported.files).items()
            }
            self.formats[name] = dataclasses.replace(exported, files=files)
        self._models = [PREPROCESS_MODEL, *self._draft.models]
        self._classifiers = {name: dict(entry) for name, entry in self._draft.classifiers.items()}

    def prove_served(self, publication: Publication, announce: Callable[[str], object]) -> None:
        """See Staging. One server for all: where a model does not even load, all of the export fails."""
        refused: dict[str, ParityError] = {}
        with proving_server(publication.root, self._models, announce=announce) as server:
            for public in self._draft.public:
                name = str(self._classifiers[public]["format"])
                try:
                    alone = dataclasses.replace(self._draft, public=(public,))
                    measured = check_slides_on(server, alone, announce)[public]
                except ServedError:
                    raise
                except ParityError as error:
                    if name == self._request.formats[0].name or not self._request.keep_refused:
                        raise
                    refused[public] = error
                else:
                    served = {**measured, "server": server.origin}
                    self.formats[name] = dataclasses.replace(self.formats[name], served=served)
        for public, refusal in refused.items():
            self._withdraw(public, refusal)

    def _withdraw(self, public: str, error: ParityError) -> None:
        entry = self._classifiers.pop(public)
        self.formats[entry["format"]] = refused_when_served(self.formats[entry["format"]], error)
        for model in (*entry["parts"]["encoders"], entry["parts"]["embedder"], public):
            self._publication.withdraw(model)
            self._models.remove(model)

    def models_in_order(self) -> list[str]:
        """See Staging."""
        return list(self._models)

    def classifiers(self) -> dict[str, dict[str, Any]]:
        """See Staging."""
        return self._classifiers

    def checkpoint(self) -> dict[str, Any]:
        """See Staging; with the figures of head and combination."""
        return {**self._draft.checkpoint, "heads": dict(self._draft.heads)}

    def pretrained(self) -> dict[str, Any] | None:
        """See Staging."""
        return dict(self._draft.pretrained) if self._draft.pretrained is not None else None
