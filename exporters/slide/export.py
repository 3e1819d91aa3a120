"""Slide checkpoints and ensembles as the models of a release: built and proven here, written by whoever asked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporters import reference_profile
from exporters.acceptance import UNPROVEN
from exporters.checkpoint_entry import pretrained_entry
from exporters.cpu_layout import cpu_layout
from exporters.errors import FormatError, GraphError, ParityError
from exporters.exported_format import ExportedFormat, refused_format, sha256
from exporters.formats.interface import OnnxTarget, ServedFormat
from exporters.serving_options import ServingOptions
from exporters.slide.bags import calibration_of, comparison_bags, golden_files
from exporters.slide.gate import EMBEDDING, EncoderGate, embedder_name, encoder_name
from exporters.slide.head import HeadRunner, embedding_names, head_onnx, open_head
from exporters.slide.parity import Reference, check_head, reference
from exporters.slide.served import check_slides_on
from exporters.slide.source import SlideSource, kind_of, of_member, of_tile_checkpoint, read_source
from exporters.slide.triton import head_files, member_label, slide_classifier_files
from exporters.triton_config import (
    CLASSIFIER_MODEL,
    CONFIG_FILENAME,
    HEAD_MODEL,
    SLIDE_MODEL,
    embedder_config,
    network_config,
    to_text,
)
from slides.spec import ModelSpec
from training.checkpoint import Checkpoint
from training.reference_profile import ReferenceProfile

__all__ = ["SlideDraft", "check_slides_on", "draft_mean", "draft_slides", "kind_of"]

LayerSource = tuple[bytes, bytes, np.ndarray]
_MOST_LAYER_TILES = 32


@dataclasses.dataclass(frozen=True)
class SlideDraft:
    """The models of a slide release, proven in this process; nothing is written yet.

    Attributes:
        kind: "tile", "slide" or "ensemble".
        files: path below models/ -> content; complete but for `tile_preprocess` and, of kind "tile", the tile classifiers.
        models: names, each after those that it refers to.
        public: those that clients ask.
        classifiers: public model -> its entry in the manifest.
        formats: by name, in the order asked for; empty for kind "tile".
        files_of: format -> path below models/ -> SHA-256 of its encoders' files.
        heads: largest differences of head and combination, see `parity.check_head`.
        checkpoint: the manifest's entry.
        pretrained: the manifest's entry.
        golden: path below golden/ -> content; empty for kind "tile", whose tiles are golden themselves.
        layer_sources: format -> FP32 ONNX, INT8 ONNX and tiles of an INT8 encoder that is not accepted.
        source, expected: what answers of a server are compared with.
        profile: what drift is measured against.
    """

    kind: str
    spec: ModelSpec
    files: Mapping[str, bytes]
    models: tuple[str, ...]
    public: tuple[str, ...]
    classifiers: Mapping[str, Mapping[str, Any]]
    formats: Mapping[str, ExportedFormat]
    files_of: Mapping[str, Mapping[str, str]]
    heads: Mapping[str, float]
    checkpoint: Mapping[str, Any]
    pretrained: Mapping[str, Any] | None
    golden: Mapping[str, bytes]
    layer_sources: Mapping[str, LayerSource]
    source: SlideSource
    expected: Reference
    profile: ReferenceProfile | None


def draft_slides(
    source: Path,
    formats: Sequence[ServedFormat],
    options: ServingOptions,
    *,
    version: int = 1,
    preprocess_version: int = 1,
    calibration_source: Path | None = None,
    bags_source: Path | None = None,
    publish_unproven: bool = False,
    keep_refused: bool = False,
    unservable: Callable[[ServedFormat], str | None] = lambda fmt: None,
    onnx_target: OnnxTarget | None = None,
    announce: Callable[[str], object] = lambda text: None,
) -> SlideDraft:
    """Build and prove the models of a slide checkpoint or an ensemble.

    Args:
        source: a slide checkpoint, or an ensemble.json.
        formats: of the encoders; `slide_classifier` answers with the first, each further one gets
            `slide_classifier_<format>`.
        version: of all models.
        preprocess_version: of `tile_preprocess`.
        calibration_source: tiles to calibrate INT8 encoders with.
        bags_source: a tile store to compare on, in place of the golden bags.
        publish_unproven: also write further formats that this machine cannot prove.
        keep_refused: list a further format that is refused and go on; otherwise its refusal is raised.
        unservable: why the server of this machine cannot load a format, or None.
        onnx_target: what has to be able to read ONNX files.
        announce: told what is going on.

    Raises:
        TrainingError: the checkpoint or definition cannot be used; see `exporters.slide.source`.
        FormatError, GraphError, GoldenTilesError, ParityError: see `exporters.errors`.
    """
    announce("reading the checkpoint")
    read = read_source(source)
    calibrated = [fmt.name for fmt in formats if fmt.calibrated]
    if calibrated and calibration_source is None:
        raise FormatError(
            f"{', '.join(calibrated)} has to be calibrated with tiles that the network was trained on: give the data "
            "set, tile store or directory with --calibration-tiles."
        )
    announce("asking PyTorch about the bags")
    expected = reference(read, comparison_bags(read, bags_source))
    profile = reference_profile.of_manifest(read.manifests[0]) if len(read.members) == 1 else None
    profile = profile or reference_profile.of_bags(
        expected, read.spec.class_names, golden=bags_source is None
    )
    target = onnx_target or OnnxTarget()
    drafting = _Drafting(read, expected, options, version, target, announce, profile)
    with EncoderGate(
        read,
        drafting.head,
        expected,
        max_batch=options.max_batch,
        calibration_NHWC=calibration_of(read, calibration_source)
        if calibration_source and calibrated
        else None,
        target=target,
        announce=announce,
    ) as gate:
        for fmt in formats:
            first = fmt is formats[0]
            try:
                outcome = gate.prove(fmt)
            except (GraphError, ParityError) as error:
                if first or not keep_refused:
                    raise
                artifact = gate.together(fmt) if gate.built(fmt.name) is not None else None
                refused = refused_format(fmt, artifact, error)
                drafting.formats[fmt.name] = dataclasses.replace(
                    refused, model=encoder_name(fmt, 0, len(read.members))
                )
                continue
            reasons = (*outcome.acceptance.reasons, *filter(None, [unservable(fmt)]))
            if reasons:
                acceptance = dataclasses.replace(outcome.acceptance, status=UNPROVEN, reasons=reasons)
                outcome = dataclasses.replace(outcome, acceptance=acceptance)
            if reasons and first:
                raise ParityError(
                    f"{fmt.name} cannot be {SLIDE_MODEL}, because it is unproven here: {'; '.join(reasons)}. Name a format "
                    "first that this machine can prove. Nothing was published."
                )
            drafting.formats[fmt.name] = outcome
            if not reasons or publish_unproven:
                drafting.add(fmt, gate, outcome, preprocess_version=preprocess_version, first=first)
        layers = _layers(gate, drafting.formats, expected)
    return drafting.finished(golden_files(read, expected), layers)


def draft_mean(
    checkpoint: Checkpoint,
    classifiers: Mapping[str, str],
    options: ServingOptions,
    *,
    version: int = 1,
    onnx_target: OnnxTarget | None = None,
    profile: ReferenceProfile | None = None,
    announce: Callable[[str], object] = lambda text: None,
) -> SlideDraft:
    """`slide_classifier` of a tile checkpoint: the mean of its tile classifier's probabilities, attention 1/T.

    Args:
        checkpoint: of tiles; its tile classifiers are proven and written by the caller.
        classifiers: format -> the tile classifier that answers with it, in order; `slide_classifier` asks the first.
        version: of all models, the tile classifiers too.
        profile: what drift is measured against.

    Raises:
        GraphError, GoldenTilesError, ParityError: see `exporters.errors`.
    """
    read = of_member(of_tile_checkpoint(checkpoint), checkpoint.manifest)
    announce("asking PyTorch about the slides")
    expected = reference(read, comparison_bags(read, None))
    drafting = _Drafting(read, expected, options, version, onnx_target or OnnxTarget(), announce, profile)
    for format_name, classifier in classifiers.items():
        name = classifier.replace(CLASSIFIER_MODEL, SLIDE_MODEL, 1)
        drafting.add_classifier(
            name, format_name, embedder=classifier, outputs=("probabilities",), parts={"embedder": classifier}
        )
    return drafting.finished({}, {})


class _Drafting:
    """The models of a draft, one by one."""

    def __init__(
        self,
        source: SlideSource,
        expected: Reference,
        options: ServingOptions,
        version: int,
        target: OnnxTarget,
        announce: Callable[[str], object],
        profile: ReferenceProfile | None,
    ) -> None:
        self.source, self.expected, self.options, self.version = source, expected, options, version
        self.profile = profile
        announce("the head: building")
        content = head_onnx([member.head for member in source.members], source.definition, target)
        self.head: HeadRunner = open_head(content)
        announce("the head: comparing with PyTorch")
        self.heads = check_head(source, self.head, expected)
        self.files: dict[str, bytes] = head_files(source, content, version)
        self.models: list[str] = [HEAD_MODEL]
        self.classifiers: dict[str, dict[str, Any]] = {}
        self.formats: dict[str, ExportedFormat] = {}
        self.files_of: dict[str, dict[str, str]] = {}

    def add(
        self,
        fmt: ServedFormat,
        gate: EncoderGate,
        outcome: ExportedFormat,
        *,
        preprocess_version: int,
        first: bool,
    ) -> None:
        """A format's encoders, their embedder, and the classifier that asks it."""
        artifacts = gate.build(fmt)
        tensors = fmt.tensors_of((EMBEDDING,))
        size_bytes = sum(artifact.size_bytes for artifact in artifacts)
        # As of a slow network, whatever it computes: a bag keeps it fed.
        layout = cpu_layout(self.options.instances, None, 0.0, size_bytes)
        encoders = []
        self.files_of[fmt.name] = {}
        for m, (artifact, member) in enumerate(zip(artifacts, self.source.members, strict=True)):
            config = network_config(
                encoder_name(fmt, m, len(artifacts)),
                backend=fmt.backend,
                platform=fmt.platform,
                artifact_filename=fmt.artifact_filename,
                tensors=tensors,
                parameters=layout.parameters(fmt.parameters),
                input_size_px=self.source.spec.input_size_px,
                classes=len(self.source.spec.class_names),
                max_batch=self.options.max_batch,
                instances=self.options.instances if first else 1,
                instance_kind=self.options.instance_kind,
                versions_loaded=self.options.versions_loaded,
                embedding_dim=member.head.embedding_dim,
            )
            encoders.append((config, tensors))
            self.models.append(config.name)
            self.files[f"{config.name}/{CONFIG_FILENAME}"] = to_text(config).encode()
            for filename, content in artifact.files.items():
                path = f"{config.name}/{self.version}/{filename}"
                self.files[path] = content
                self.files_of[fmt.name][path] = sha256(content)
        embedder = embedder_config(
            embedder_name(fmt),
            encoders=encoders,
            outputs=embedding_names(len(artifacts)),
            version=self.version,
            preprocess_version=preprocess_version,
        )
        self.models.append(embedder.name)
        self.files[f"{embedder.name}/{CONFIG_FILENAME}"] = to_text(embedder).encode()
        # Triton wants an ensemble's version directory to exist; git and object stores keep none that is empty.
        about = {"encoders": [config.name for config, _ in encoders], "format": fmt.name}
        self.files[f"{embedder.name}/{self.version}/parts.json"] = _compact(about)
        name = SLIDE_MODEL if first else f"{SLIDE_MODEL}_{fmt.name.replace('-', '_')}"
        self.add_classifier(
            name,
            fmt.name,
            embedder=embedder.name,
            outputs=embedding_names(len(artifacts)),
            parts={"encoders": about["encoders"], "embedder": embedder.name},
            unproven=outcome.acceptance.reasons,
        )
        self.formats[fmt.name] = dataclasses.replace(outcome, classifiers=(name,))

    def add_classifier(
        self,
        name: str,
        format_name: str,
        *,
        embedder: str,
        outputs: Sequence[str],
        parts: Mapping[str, Any],
        unproven: Sequence[str] = (),
    ) -> None:
        """A public model that asks `embedder` and the head."""
        self.files |= slide_classifier_files(
            self.source,
            name,
            format_name,
            embedder=embedder,
            embedder_outputs=outputs,
            version=self.version,
            max_batch=self.options.max_batch,
            unproven=unproven,
            profile=self.profile,
        )
        self.models.append(name)
        self.classifiers[name] = {"format": format_name, "parts": {**parts, "head": HEAD_MODEL}}

    def finished(self, golden: Mapping[str, bytes], layers: Mapping[str, LayerSource]) -> SlideDraft:
        """The draft; `slide_classifier` itself is published last."""
        return SlideDraft(
            kind=self.source.kind,
            spec=self.source.spec,
            files=self.files,
            models=tuple(sorted(self.models, key=lambda name: name == SLIDE_MODEL)),
            public=tuple(self.classifiers),
            classifiers=self.classifiers,
            formats=self.formats,
            files_of=self.files_of,
            heads={name: float(f"{value:.3g}") for name, value in self.heads.items()},
            checkpoint=self.source.origin,
            pretrained=_pretrained(self.source),
            golden=golden,
            layer_sources=layers,
            source=self.source,
            expected=self.expected,
            profile=self.profile,
        )


def _layers(
    gate: EncoderGate, formats: Mapping[str, ExportedFormat], expected: Reference
) -> dict[str, LayerSource]:
    """Of the first member, whose picture stands for all."""
    fp32, int8 = gate.built("onnx"), gate.built("onnx-int8")
    exported = formats.get("onnx-int8")
    if fp32 is None or int8 is None or exported is None or exported.acceptance.status == "accepted":
        return {}
    files = (fp32[0].files["model.onnx"], int8[0].files["model.onnx"])
    return {"onnx-int8": (*files, expected.tiles_NHWC[:_MOST_LAYER_TILES])}


def _pretrained(source: SlideSource) -> dict[str, Any] | None:
    """Of the only network; of an ensemble, of each member that started from something."""
    entries = [pretrained_entry(manifest) for manifest in source.manifests]
    if len(entries) == 1:
        return entries[0]
    told = {member_label(source, m): entry for m, entry in enumerate(entries) if entry is not None}
    return {"members": told} if told else None


def _compact(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
