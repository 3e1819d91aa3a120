"""Exporting a checkpoint: build, prove, then publish all of it or nothing.

There is one way: models are staged, proven in this process and through a tritonserver, and renamed into a model repository.
`export_checkpoint` does that with a repository that is there to stay; `export_release` with a fresh one, models/ of a
release, and adds golden tiles, pictures, the model card and the manifest.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from exporters.draft import ExportedFormat, ServingOptions
from exporters.errors import FormatError
from exporters.formats import formats_named
from exporters.publication import Publication, hold_repository
from exporters.release_manifest import (
    CARD_NAME,
    GOLDEN,
    MANIFEST_NAME,
    MODELS,
    Manifest,
    entries_of,
    file_entry,
    to_text,
)
from exporters.release_place import ReleasePlace, hold_release
from exporters.staging import Request, Staging, stage

__all__ = ["ExportedFormat", "Release", "ServingOptions", "export_checkpoint", "export_release"]

WITHOUT_SERVER = "asked for with --without-server"


@dataclasses.dataclass(frozen=True)
class Release:
    """What an export published.

    Attributes:
        repository: the model repository.
        version: of every network and ensemble in `formats`.
        models: all models written, preprocessing included, in the order of publication.
        formats: by name, in the order asked for; `tile_classifier` (`slide_classifier`) answers with the first. One
            that is refused, or unproven and was not asked to be published, has no classifiers.
        directory: of the release; None where models were published into a repository.
        manifest: of the release.
    """

    repository: Path
    version: int
    models: tuple[str, ...]
    formats: Mapping[str, ExportedFormat]
    directory: Path | None = None
    manifest: Manifest | None = None


def export_checkpoint(
    checkpoint_dir: Path | str,
    repository: Path | str,
    format_names: Sequence[str],
    options: ServingOptions | None = None,
    *,
    tiles_source: Path | str | None = None,
    calibration_source: Path | str | None = None,
    publish_unproven: bool = False,
    served: bool = True,
    container: str | None = None,
    interrupted: threading.Event | None = None,
) -> Release:
    """Export a checkpoint into a Triton model repository, at the next version number.

    Args:
        checkpoint_dir: a Checkpoint as training writes it, or the definition of an ensemble.
        repository: model repository; made if it does not exist.
        format_names: keys of `exporters.formats.FORMATS`; `tile_classifier` answers with the first, each further
            one gets `tile_classifier_<format>`.
        options: how to serve; the defaults if None.
        tiles_source: tiles for the parity gate, instead of the checkpoint's golden tiles; see
            `exporters.comparison_tiles`.
        calibration_source: tiles to calibrate INT8 with, of the training data.
        publish_unproven: also publish formats that this machine cannot prove, never as `tile_classifier`.
        served: prove the models through a tritonserver too; False leaves that out.
        container: tag of the Triton container that will serve, such as "26.07"; None for any of the last years.
        interrupted: once set, nothing is published; looked at just before publication.

    Raises:
        KeyboardInterrupt: `interrupted` was set.
        FormatError: unknown format, or one that cannot be built on this machine or with what was given.
        training.errors.CheckpointError: the checkpoint is missing, damaged or of another version.
        GraphError, GoldenTilesError, ParityError, RepositoryError: see `exporters.errors`.
    """
    request = _request(
        checkpoint_dir,
        format_names,
        options,
        tiles_source=tiles_source,
        calibration_source=calibration_source,
        publish_unproven=publish_unproven,
        served=served,
        container=container,
    )
    with _progress() as progress:
        published, _ = _publish(request, Path(repository).absolute(), progress, interrupted)
    return published


def export_release(
    checkpoint_dir: Path | str,
    directory: Path | str,
    format_names: Sequence[str],
    options: ServingOptions | None = None,
    *,
    tiles_source: Path | str | None = None,
    calibration_source: Path | str | None = None,
    publish_unproven: bool = False,
    served: bool = True,
    strict: bool = False,
    container: str | None = None,
    mlflow: Mapping[str, Any] | None = None,
    interrupted: threading.Event | None = None,
) -> Release:
    """Write a release: a directory with everything that is needed to serve a checkpoint, and to trust it.

    Args:
        directory: must not exist.
        strict: a further format that is refused fails the export; otherwise it is listed with its figures, and not
            published.
        mlflow: run and registered version that the checkpoint came from.

    All others, and what is raised, as `export_checkpoint`; besides:

    Raises:
        ReleaseExistsError, ReleaseBusyError: there is something at `directory`, or about to be.
        ReleaseError: it cannot be written.
    """
    request = _request(
        checkpoint_dir,
        format_names,
        options,
        tiles_source=tiles_source,
        calibration_source=calibration_source,
        publish_unproven=publish_unproven,
        served=served,
        container=container,
        keep_refused=not strict,
        with_slides=True,
    )
    directory = Path(directory).absolute()
    with hold_release(directory) as place, _progress() as progress:
        published, staging = _publish(request, place.aside / MODELS, progress, interrupted)
        progress.set_description("writing the release")
        manifest = _write(place, staging, request, mlflow)
        if interrupted is not None and interrupted.is_set():
            raise KeyboardInterrupt
        place.publish()
    return dataclasses.replace(
        published, repository=directory / MODELS, directory=directory, manifest=manifest
    )


def _request(
    source: Path | str,
    format_names: Sequence[str],
    options: ServingOptions | None,
    *,
    tiles_source: Path | str | None,
    calibration_source: Path | str | None,
    publish_unproven: bool,
    served: bool,
    container: str | None,
    keep_refused: bool = False,
    with_slides: bool = False,
) -> Request:
    formats = formats_named(format_names)
    for fmt in formats:
        fmt.require()
    calibrated = [fmt.name for fmt in formats if fmt.calibrated]
    if calibrated and calibration_source is None:
        raise FormatError(
            f"{', '.join(calibrated)} has to be calibrated with tiles that the network was trained on: give the data "
            "set, tile store or directory with --calibration-tiles."
        )
    newest = None
    if container is not None:
        from exporters.preflight.table import newest_loadable

        newest = newest_loadable(container)
    return Request(
        source=Path(source),
        formats=formats,
        options=options or ServingOptions(),
        tiles_source=Path(tiles_source) if tiles_source is not None else None,
        calibration_source=Path(calibration_source)
        if calibrated and calibration_source is not None
        else None,
        publish_unproven=publish_unproven,
        keep_refused=keep_refused,
        served=served,
        with_slides=with_slides,
        newest_onnx=newest,
    )


def _publish(
    request: Request, repository: Path, progress: tqdm, interrupted: threading.Event | None
) -> tuple[Release, Staging]:
    with hold_repository(repository), Publication(repository) as publication:
        staging = stage(request, repository, publication, progress.set_description)
        if request.served:
            staging.prove_served(publication, progress.set_description)
            publication.drop_unstaged()
        progress.set_description("publishing")
        models = staging.models_in_order()
        if interrupted is not None and interrupted.is_set():
            raise KeyboardInterrupt
        publication.publish(models)
    return Release(repository, staging.version, tuple(models), dict(staging.formats)), staging


def _write(
    place: ReleasePlace, staging: Staging, request: Request, mlflow: Mapping[str, Any] | None
) -> Manifest:
    """Golden tiles, pictures, card and manifest, beside the models that are there."""
    from exporters.model_card import render
    from exporters.release_record import format_entries, manifest_of, plots

    formats = format_entries(staging, None if request.served else WITHOUT_SERVER)
    place.write({f"{GOLDEN}/{path}": content for path, content in staging.golden.items()})
    place.write(plots(staging, formats))
    manifest = manifest_of(staging, formats, entries_of(place.aside), mlflow)
    # The card tells nothing of itself, so that it can be written from the manifest of all other files.
    place.write({CARD_NAME: render(manifest).encode()})
    card = {CARD_NAME: file_entry(place.aside / CARD_NAME).model_dump()}
    manifest = Manifest.model_validate(
        {**manifest.as_dict(), "files": {**manifest.as_dict()["files"], **card}}
    )
    place.write({MANIFEST_NAME: to_text(manifest).encode()})
    return manifest


def _progress() -> tqdm:
    return tqdm(bar_format="{desc} [{elapsed}]", leave=False)
