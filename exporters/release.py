"""A Release: one version of every model that an export writes, made and proven from one Checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from exporters.acceptance import UNPROVEN, judge
from exporters.comparison_tiles import ComparisonTiles, calibration_tiles, comparison_tiles
from exporters.draft import Draft, ExportedFormat, ServingOptions, exported_format
from exporters.errors import FormatError, ParityError
from exporters.formats import formats_named
from exporters.formats.interface import Answer, Artifact, Network, Runner, ServedFormat
from exporters.parity import check_parity, reference_answer
from exporters.publication import Publication, hold_repository
from training.checkpoint import load as load_checkpoint

__all__ = ["ExportedFormat", "Release", "ServingOptions", "export_checkpoint"]


@dataclasses.dataclass(frozen=True)
class Release:
    """What an export published.

    Attributes:
        repository: where.
        version: version of every network and ensemble in `formats`.
        models: all models written, preprocessing included, in the order of publication.
        formats: by name, in the order asked for; `tile_classifier` answers with the first. One that is unproven and
            was not asked to be published has no classifiers.
    """

    repository: Path
    version: int
    models: tuple[str, ...]
    formats: Mapping[str, ExportedFormat]


def export_checkpoint(
    checkpoint_dir: Path | str,
    repository: Path | str,
    format_names: Sequence[str],
    options: ServingOptions | None = None,
    *,
    tiles_source: Path | str | None = None,
    calibration_source: Path | str | None = None,
    publish_unproven: bool = False,
    interrupted: threading.Event | None = None,
) -> Release:
    """Export a checkpoint to a Triton model repository: build, prove, then publish all of it or nothing.

    Args:
        checkpoint_dir: a Checkpoint as training writes it.
        repository: model repository; made if it does not exist.
        format_names: keys of `exporters.formats.FORMATS`; `tile_classifier` answers with the first, each further
            one gets `tile_classifier_<format>`.
        options: how to serve; the defaults if None.
        tiles_source: tiles for the parity gate, instead of the checkpoint's golden tiles; see
            `exporters.comparison_tiles`.
        calibration_source: tiles to calibrate INT8 with, of the training data.
        publish_unproven: also publish formats that this machine cannot prove, never as `tile_classifier`.
        interrupted: once set, nothing is published; looked at just before publication.

    Raises:
        KeyboardInterrupt: `interrupted` was set.
        FormatError: unknown format, or one that cannot be built on this machine or with what was given.
        training.errors.CheckpointError: the checkpoint is missing, damaged or of another version.
        GraphError, GoldenTilesError, ParityError, RepositoryError: see `exporters.errors`.
    """
    options = options or ServingOptions()
    formats = formats_named(format_names)
    for fmt in formats:
        fmt.require()
    calibrated = [fmt.name for fmt in formats if fmt.calibrated]
    if calibrated and calibration_source is None:
        raise FormatError(
            f"{', '.join(calibrated)} has to be calibrated with tiles that the network was trained on: give the data "
            "set, tile store or directory with --calibration-tiles."
        )
    repository = Path(repository).absolute()
    with (
        hold_repository(repository),
        tqdm(total=3 * len(formats) + 1, unit="step", leave=False) as progress,
        contextlib.ExitStack() as scratch,
    ):
        progress.set_description("reading the checkpoint")
        checkpoint = load_checkpoint(checkpoint_dir)
        tiles = comparison_tiles(checkpoint, Path(tiles_source) if tiles_source is not None else None)
        network = Network(
            checkpoint.model.backbone,
            checkpoint.spec.mean,
            checkpoint.spec.std,
            checkpoint.spec.input_size_px,
            options.max_batch,
            calibration_tiles(checkpoint, Path(calibration_source))
            if calibrated and calibration_source is not None
            else None,
        )
        gate = _Gate(network, tiles, reference_answer(checkpoint.model, tiles.tiles_NHWC), scratch, progress)
        progress.update()
        with Publication(repository) as publication:
            draft = Draft(repository, checkpoint, options, publication, formats)
            exported = {}
            for number, fmt in enumerate(formats):
                progress.set_description(f"{fmt.name}: building")
                artifact = gate.build(fmt)
                for filename, content in artifact.files.items():
                    publication.stage(draft.path_of(fmt, filename), content)
                progress.update()
                outcome = gate.pass_through(
                    fmt, artifact, publication.staged(draft.path_of(fmt, fmt.artifact_filename))
                )
                progress.update()
                unproven = outcome.acceptance.status == UNPROVEN
                if unproven and number == 0:
                    raise ParityError(
                        f"{fmt.name} cannot be tile_classifier, because it is unproven here: "
                        f"{'; '.join(outcome.acceptance.reasons)}. Name a format first that this machine can prove. "
                        "Nothing was published."
                    )
                if unproven and not publish_unproven:
                    publication.withdraw(fmt.model_name)
                    exported[fmt.name] = outcome
                else:
                    progress.set_description(f"{fmt.name}: configuring")
                    exported[fmt.name] = draft.add(
                        fmt, artifact, outcome.parity, outcome.acceptance, first=number == 0
                    )
                progress.update()
            progress.set_description("publishing")
            models = draft.models_in_order()
            if interrupted is not None and interrupted.is_set():
                raise KeyboardInterrupt
            publication.publish(models)
    return Release(repository, draft.version, tuple(models), exported)


@dataclasses.dataclass
class _Gate:
    """Builds formats and proves them; an FP32 format that others have to beat is built once."""

    network: Network
    tiles: ComparisonTiles
    expected: Answer
    scratch: contextlib.ExitStack
    progress: tqdm
    built: dict[str, Artifact] = dataclasses.field(default_factory=dict)
    runners: dict[str, Runner] = dataclasses.field(default_factory=dict)

    def build(self, fmt: ServedFormat) -> Artifact:
        if fmt.name not in self.built:
            self.built[fmt.name] = fmt.build(self.network)
        return self.built[fmt.name]

    def pass_through(self, fmt: ServedFormat, artifact: Artifact, path: Path) -> ExportedFormat:
        """Raises ParityError, or says how well it did."""
        self.progress.set_description(f"{fmt.name}: comparing with PyTorch")
        run = measured = None
        if fmt.runs_here():
            run = self.runners[fmt.name] = fmt.open(path)
            measured = check_parity(
                fmt.name,
                run,
                self.tiles.tiles_NHWC,
                self.expected,
                max_batch=self.network.max_batch,
                precision=fmt.precision,
                truth=self.tiles.truth,
            )
        acceptance = judge(
            fmt,
            artifact,
            measured,
            run=run,
            baseline=self._baseline(fmt.baseline) if fmt.baseline is not None else None,
            tiles_NHWC=self.tiles.tiles_NHWC,
            max_batch=self.network.max_batch,
        )
        return exported_format(fmt, artifact, measured, acceptance)

    def _baseline(self, name: str) -> tuple[Artifact, Runner | None]:
        (fmt,) = formats_named([name])
        artifact = self.build(fmt)
        if name not in self.runners and fmt.runs_here():
            self.progress.set_description(f"{name}: to be beaten")
            directory = Path(self.scratch.enter_context(tempfile.TemporaryDirectory(prefix="clotline-fp32-")))
            for filename, content in artifact.files.items():
                (directory / filename).write_bytes(content)
            self.runners[name] = fmt.open(directory / fmt.artifact_filename)
        return artifact, self.runners.get(name)
