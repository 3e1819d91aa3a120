"""A tile checkpoint as `tile_classifier`, and as `slide_classifier` by the mean over a slide's tiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exporters import reference_profile
from exporters.acceptance import ACCEPTED, UNPROVEN
from exporters.checkpoint_entry import checkpoint_entry, pretrained_entry
from exporters.comparison_tiles import calibration_tiles, comparison_tiles
from exporters.draft import Draft
from exporters.errors import ExportError, GraphError, ParityError, ServedError
from exporters.exported_format import ExportedFormat, refused_format, refused_when_served
from exporters.formats.interface import Artifact, Network, ServedFormat
from exporters.golden import golden_of_tiles
from exporters.parity import reference_answer
from exporters.proving_server import ProvingServer, proving_server, unservable_here
from exporters.publication import Publication
from exporters.served_parity import check_served_on
from exporters.slide.export import SlideDraft, check_slides_on, draft_mean
from exporters.staging import LayerSource, Request, Staging
from exporters.tile_gate import TileGate
from exporters.triton_config import HEAD_MODEL
from training.checkpoint import load as load_checkpoint

MOST_LAYER_TILES = 32


class TileStaging(Staging):
    """See the module and `Staging`."""

    kind = "tile"

    def __init__(
        self, request: Request, repository: Path, publication: Publication, announce: Callable[[str], object]
    ) -> None:
        announce("reading the checkpoint")
        self._request, self._publication, self._announce = request, publication, announce
        self._checkpoint = checkpoint = load_checkpoint(request.source)
        self.spec = checkpoint.spec
        self._tiles = comparison_tiles(checkpoint, request.tiles_source)
        self._expected = reference_answer(checkpoint.model, self._tiles.tiles_NHWC)
        self.reference = reference_profile.of_manifest(checkpoint.manifest) or reference_profile.of_tiles(
            self._tiles, self._expected.probabilities, golden=request.tiles_source is None
        )
        self._draft = Draft(
            repository, checkpoint, request.options, publication, request.formats, self.reference
        )
        self.version = self._draft.version
        self.formats: dict[str, ExportedFormat] = {}
        self._slides: SlideDraft | None = None
        self._slide_models: list[str] = []
        self._slide_classifiers: dict[str, dict[str, Any]] = {}
        network = Network(
            checkpoint.model.backbone,
            self.spec.mean,
            self.spec.std,
            self.spec.input_size_px,
            request.options.max_batch,
            calibration_tiles(checkpoint, request.calibration_source)
            if request.calibration_source is not None
            else None,
            onnx_target=request.onnx_target,
        )
        with TileGate(network, self._tiles, self._expected, announce) as gate:
            for fmt in request.formats:
                self.formats[fmt.name] = self._add(fmt, gate, first=not self.formats)
            self.layer_sources: Mapping[str, LayerSource] = self._layers(gate)
        self.golden = golden_of_tiles(checkpoint, self._tiles.encoded)
        if request.with_slides:
            self._stage_slides()

    def _add(self, fmt: ServedFormat, gate: TileGate, *, first: bool) -> ExportedFormat:
        artifact: Artifact | None = None
        try:
            artifact = gate.build(fmt)
            for filename, content in artifact.files.items():
                self._publication.stage(self._draft.path_of(fmt, filename), content)
            staged = self._publication.staged(self._draft.path_of(fmt, fmt.artifact_filename))
            outcome = gate.prove(fmt, artifact, staged)
        except (GraphError, ParityError) as error:
            return self._refuse(fmt, artifact, error, first=first)
        acceptance = outcome.acceptance
        unservable = unservable_here(fmt) if self._request.served else None
        if unservable is not None:
            acceptance = dataclasses.replace(
                acceptance, status=UNPROVEN, reasons=(*acceptance.reasons, unservable)
            )
        if acceptance.status == UNPROVEN and first:
            raise ParityError(
                f"{fmt.name} cannot be tile_classifier, because it is unproven here: "
                f"{'; '.join(acceptance.reasons)}. Name a format first that this machine can prove. "
                "Nothing was published."
            )
        if acceptance.status == UNPROVEN and not self._request.publish_unproven:
            self._publication.withdraw(fmt.model_name)
            return dataclasses.replace(outcome, acceptance=acceptance)
        return self._draft.add(fmt, artifact, outcome.parity, acceptance, first=first)

    def _refuse(
        self, fmt: ServedFormat, artifact: Artifact | None, error: ExportError, *, first: bool
    ) -> ExportedFormat:
        if first or not self._request.keep_refused:
            raise error
        self._publication.withdraw(fmt.model_name)
        return refused_format(fmt, artifact, error)

    def _layers(self, gate: TileGate) -> dict[str, LayerSource]:
        fp32, int8 = gate.built("onnx"), gate.built("onnx-int8")
        wanting = [
            name
            for name, exported in self.formats.items()
            if exported.precision == "int8" and exported.acceptance.status != ACCEPTED
        ]
        if fp32 is None or int8 is None or "onnx-int8" not in wanting:
            return {}
        files = (fp32.files["model.onnx"], int8.files["model.onnx"])
        return {"onnx-int8": (*files, self._tiles.tiles_NHWC[:MOST_LAYER_TILES])}

    def _stage_slides(self) -> None:
        """Stage a slide classifier over each tile classifier."""
        answering = {
            name: exported.classifiers[0] for name, exported in self.formats.items() if exported.classifiers
        }
        self._slides = draft_mean(
            self._checkpoint,
            answering,
            self._request.options,
            version=self.version,
            onnx_target=self._request.onnx_target,
            profile=self.reference,
            announce=self._announce,
        )
        for path, content in self._slides.files.items():
            self._publication.stage(path, content)
        self._slide_models = list(self._slides.models)
        self._slide_classifiers = {name: dict(entry) for name, entry in self._slides.classifiers.items()}

    def prove_served(self, publication: Publication, announce: Callable[[str], object]) -> None:
        """See Staging. Where a model does not even load, each format gets a server of its own to find out which."""
        servable = [
            fmt
            for fmt in self._request.formats
            if self.formats[fmt.name].classifiers and unservable_here(fmt) is None
        ]
        try:
            refused = self._prove_on_one_server(servable, announce)
        except ServedError:
            if len(servable) == 1 or not self._request.keep_refused:
                raise
            refused = {}
            for fmt in servable:
                try:
                    refused |= self._prove_on_one_server([fmt], announce)
                except ServedError as error:
                    refused[fmt.name] = error
        for fmt in servable:
            if fmt.name in refused:
                if fmt is servable[0] or not self._request.keep_refused:
                    raise refused[fmt.name]
                self._withdraw(fmt.name, refused[fmt.name])

    def _prove_on_one_server(
        self, formats: Sequence[ServedFormat], announce: Callable[[str], object]
    ) -> dict[str, ParityError]:
        """Refused formats, by name; the figures of all others are kept."""
        refused: dict[str, ParityError] = {}
        models = [self.formats[fmt.name].classifiers[0] for fmt in formats]
        # What a slide classifier asks is not in its configuration's steps, so its parts are named.
        models += [] if self._slides is None else [HEAD_MODEL]
        models += [name for fmt in formats for name in self._slide_classifiers_of(fmt.name)]
        with proving_server(self._publication.root, models, announce=announce) as server:
            for fmt in formats:
                try:
                    self._prove_on(server, fmt, announce)
                except ServedError:
                    raise
                except ParityError as error:
                    refused[fmt.name] = error
        return refused

    def _prove_on(self, server: ProvingServer, fmt: ServedFormat, announce: Callable[[str], object]) -> None:
        exported = self.formats[fmt.name]
        name = exported.classifiers[0]
        measured = check_served_on(
            server,
            {name: fmt},
            self._tiles,
            self._expected,
            spec=self.spec,
            max_batch=self._request.options.max_batch,
            announce=announce,
        )[name]
        served = {**dataclasses.asdict(measured), "server": server.origin}
        if self._slides is not None:
            slides = dataclasses.replace(self._slides, public=tuple(self._slide_classifiers_of(fmt.name)))
            for public, figures in check_slides_on(server, slides, announce).items():
                self._slide_classifiers[public]["served"] = {**figures, "server": server.origin}
        self.formats[fmt.name] = dataclasses.replace(exported, served=served)

    def _slide_classifiers_of(self, format_name: str) -> list[str]:
        return [name for name, entry in self._slide_classifiers.items() if entry["format"] == format_name]

    def _withdraw(self, format_name: str, error: ParityError) -> None:
        before = self.formats[format_name]
        self._draft.withdraw(before)
        self.formats[format_name] = refused_when_served(before, error)
        for public in self._slide_classifiers_of(format_name):
            self._publication.withdraw(public)
            self._slide_models.remove(public)
            del self._slide_classifiers[public]

    def models_in_order(self) -> list[str]:
        """See Staging; a slide classifier asks a tile classifier, so it comes after them."""
        return [*self._draft.models_in_order(), *self._slide_models]

    def classifiers(self) -> dict[str, dict[str, Any]]:
        """See Staging."""
        of_tiles: dict[str, dict[str, Any]] = {
            classifier: {"format": name, "network": exported.model}
            for name, exported in self.formats.items()
            for classifier in exported.classifiers
        }
        return {**of_tiles, **self._slide_classifiers}

    def checkpoint(self) -> dict[str, Any]:
        """See Staging."""
        return checkpoint_entry(self._checkpoint.manifest)

    def pretrained(self) -> dict[str, Any] | None:
        """See Staging."""
        return pretrained_entry(self._checkpoint.manifest)
