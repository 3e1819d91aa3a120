"""What already stands in a model repository that an export goes into, and what must not be broken there."""

from __future__ import annotations

from pathlib import Path

from exporters.errors import RepositoryError
from exporters.publication import Publication
from exporters.serving_options import ServingOptions
from exporters.triton_config import (
    CONFIG_FILENAME,
    NETWORK_PREFIX,
    PREPROCESS_MODEL,
    ModelConfig,
    from_text,
    preprocess_config,
    to_text,
)
from slides.decode import MAX_TILE_BYTES, MAX_TILE_PIXELS

_OURS = (
    "tile_network_*",
    "tile_classifier*",
    "tile_encoder_*",
    "tile_embedder_*",
    "slide_head*",
    "slide_classifier*",
)
_TAKE_TILES = (NETWORK_PREFIX, "tile_encoder_")
_HAND_WRITTEN_PREPROCESS = Path(__file__).resolve().parent.parent / "model_repository" / PREPROCESS_MODEL


def next_version(repository: Path) -> int:
    """One more than the highest version of any model that an export wrote; 1 in an empty repository."""
    found = [
        version for pattern in _OURS for model in repository.glob(pattern) for version in versions_of(model)
    ]
    return 1 + max(found, default=0)


def preprocess_version(repository: Path) -> int:
    """Version of `tile_preprocess` that `stage_preprocess` stages."""
    return _preprocess_source(repository)[0]


def stage_preprocess(
    publication: Publication,
    repository: Path,
    input_size_px: int,
    options: ServingOptions,
    instances: int | None = None,
) -> int:
    """Stage `tile_preprocess`, which all tile ensembles share; returns its version.

    Args:
        instances: processes that decode at the same time, `options.instances` if it is not known how many are kept busy.

    Raises:
        RepositoryError: its code is neither in this checkout nor in the repository.
    """
    version, source = _preprocess_source(repository)
    publication.stage(f"{PREPROCESS_MODEL}/{version}/{source.name}", source.read_bytes())
    config = preprocess_config(
        input_size_px=input_size_px,
        max_batch=options.max_batch,
        instances=instances or options.instances,
        max_tile_bytes=MAX_TILE_BYTES,
        max_tile_pixels=MAX_TILE_PIXELS,
    )
    publication.stage(f"{PREPROCESS_MODEL}/{CONFIG_FILENAME}", to_text(config).encode())
    return version


def refuse_to_strand(repository: Path, exported: set[str], input_size_px: int, max_batch: int) -> None:
    """All ensembles share `tile_preprocess`; a network that is not among `exported` must still fit to it.

    Raises:
        RepositoryError: one does not, naming it.
    """
    models = [model for prefix in _TAKE_TILES for model in sorted(repository.glob(f"{prefix}*"))]
    for model in models:
        config = read_config(model)
        if config is None or model.name in exported or not config.input:
            continue
        if (
            list(config.input[0].dims) != [input_size_px, input_size_px, 3]
            or config.max_batch_size > max_batch
        ):
            served = f"{config.input[0].dims[0]} px, batches up to {config.max_batch_size}"
            raise RepositoryError(
                f"{repository} also serves {model.name} ({served}), which would no longer fit to the tiles of this "
                f"export ({input_size_px} px, batches up to {max_batch}). Export all its formats at once, "
                f"name another --repository, or delete {model.name} and the ensembles that use it."
            )


def read_config(model: Path) -> ModelConfig | None:
    """The configuration of a model in a repository; None if it has none; RepositoryError if it is broken."""
    path = model / CONFIG_FILENAME
    try:
        return from_text(path.read_text(encoding="utf-8"), origin=str(path)) if path.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise RepositoryError(
            f"{path} cannot be read: {error}. Repair or delete it, then export again."
        ) from error


def versions_of(model: Path) -> list[int]:
    """Version numbers of a model's directory."""
    if not model.is_dir():
        return []
    return [int(entry.name) for entry in model.iterdir() if entry.name.isdecimal() and entry.is_dir()]


def _preprocess_source(repository: Path) -> tuple[int, Path]:
    """Version and file of the hand-written preprocess model: the one of this checkout, else the repository's own."""
    for model in (_HAND_WRITTEN_PREPROCESS, repository / PREPROCESS_MODEL):
        for version in sorted(versions_of(model), reverse=True):
            if (model / str(version) / "model.py").is_file():
                return version, model / str(version) / "model.py"
    raise RepositoryError(
        f"The preprocess model is not at {_HAND_WRITTEN_PREPROCESS}. Run the exporter from a checkout of Clotline, or "
        f"copy {PREPROCESS_MODEL} into the repository first."
    )
