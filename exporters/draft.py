"""The configurations of a release while it is being made: staged one by one, published together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from exporters.acceptance import Acceptance
from exporters.errors import FormatError, RepositoryError
from exporters.formats.interface import Artifact, ServedFormat
from exporters.parity import Parity
from exporters.publication import Publication
from exporters.triton_config import (
    CLASSIFIER_MODEL,
    CONFIG_FILENAME,
    INSTANCE_KINDS,
    LABELS_FILENAME,
    NETWORK_PREFIX,
    PREPROCESS_MODEL,
    ModelConfig,
    classifier_config,
    from_text,
    labels_text,
    network_config,
    preprocess_config,
    to_text,
)
from slides.decode import MAX_TILE_BYTES, MAX_TILE_PIXELS
from training.checkpoint import Checkpoint

RELEASE_FILENAME = "release.json"
RELEASE_FORMAT = "clotline.release"
RELEASE_FORMAT_VERSION = 1
LARGEST_BATCH = 1024
MOST_INSTANCES = 64
_HAND_WRITTEN_PREPROCESS = Path(__file__).resolve().parent.parent / "model_repository" / PREPROCESS_MODEL


@dataclasses.dataclass(frozen=True)
class ServingOptions:
    """How the exported models are to be served.

    Attributes:
        max_batch: most tiles in one execution, 1 to 1024; the gate proves this size too.
        instances: executions of preprocessing and of the first format's network at the same time, 1 to 64; networks
            of further formats, which are there to be compared with, have one.
        instance_kind: where the network runs, a key of `triton_config.INSTANCE_KINDS`.
        versions_loaded: newest versions of a network that the server loads, 1 or 2. With 2, an ensemble still
            pinned to the version before goes on answering during a release; it costs the memory and the start-up
            time of both. A version before of another shape is never kept loaded.

    Raises:
        FormatError: naming every value that is out of range.
    """

    max_batch: int = 8
    instances: int = 2
    instance_kind: str = "cpu"
    versions_loaded: int = 1

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.max_batch <= LARGEST_BATCH:
            problems.append(f"max_batch must be from 1 to {LARGEST_BATCH}, not {self.max_batch}")
        if not 1 <= self.instances <= MOST_INSTANCES:
            problems.append(f"instances must be from 1 to {MOST_INSTANCES}, not {self.instances}")
        if self.instance_kind not in INSTANCE_KINDS:
            problems.append(
                f"instance_kind must be one of {', '.join(INSTANCE_KINDS)}, not {self.instance_kind!r}"
            )
        if self.versions_loaded not in (1, 2):
            problems.append(f"versions_loaded must be 1 or 2, not {self.versions_loaded}")
        if problems:
            raise FormatError("; ".join(problems))


@dataclasses.dataclass(frozen=True)
class ExportedFormat:
    """One network of a release.

    Attributes:
        model: the Triton model that holds it.
        classifiers: the ensembles that answer with it; none where it was not published.
        artifact_bytes: size of its files.
        artifact_sha256: of the file that the backend looks for.
        parity: how closely it follows PyTorch; None where it cannot run on this machine.
        acceptance: whether it is proven, and against what.
        notes: how it was made.
    """

    model: str
    classifiers: tuple[str, ...]
    artifact_bytes: int
    artifact_sha256: str
    parity: Parity | None
    acceptance: Acceptance
    notes: Mapping[str, Any]


class Draft:
    """The configurations of a release, staged one by one."""

    def __init__(
        self,
        repository: Path,
        checkpoint: Checkpoint,
        options: ServingOptions,
        publication: Publication,
        formats: Sequence[ServedFormat],
    ) -> None:
        self.repository = repository
        self.options = options
        self.publication = publication
        self.spec = checkpoint.spec
        self.manifest = checkpoint.manifest
        self.labels = labels_text(checkpoint.spec.class_names)
        self.version = 1 + max(
            (
                version
                for pattern in (f"{NETWORK_PREFIX}*", f"{CLASSIFIER_MODEL}*")
                for model in repository.glob(pattern)
                for version in _versions(model)
            ),
            default=0,
        )
        self._networks: list[str] = []
        self._classifiers: list[str] = []
        _refuse_to_strand(
            repository, {fmt.model_name for fmt in formats}, self.spec.input_size_px, options.max_batch
        )
        self.preprocess_version = self._stage_preprocess()

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
        network = self._network_config(fmt, instances=self.options.instances if first else 1)
        self._stage_model(network)
        self._networks.append(network.name)
        classifiers = [CLASSIFIER_MODEL] if first else []
        of_its_own = fmt.classifier_name
        # An ensemble of an earlier export is pinned anew, lest it point to a version that is no longer loaded.
        if not first or (self.repository / of_its_own).exists():
            classifiers.append(of_its_own)
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
            config = classifier_config(
                name,
                network=network,
                tensors=fmt.tensors,
                network_version=self.version,
                preprocess_version=self.preprocess_version,
                parameters=parameters,
            )
            self._stage_model(config)
            # Triton wants the version directory of an ensemble to exist; copies to where empty directories
            # are lost (git, object stores) keep one that holds a file.
            self.publication.stage(
                f"{name}/{self.version}/{RELEASE_FILENAME}",
                self._release_json(origin, exported, artifact).encode(),
            )
            self._classifiers.append(name)
        return exported

    def models_in_order(self) -> list[str]:
        """Networks, then preprocessing, then ensembles, `tile_classifier` last: each after what it refers to."""
        ensembles = sorted(self._classifiers, key=lambda name: name == CLASSIFIER_MODEL)
        return [*self._networks, PREPROCESS_MODEL, *ensembles]

    def _network_config(self, fmt: ServedFormat, *, instances: int) -> ModelConfig:
        def build(versions_loaded: int) -> ModelConfig:
            return network_config(
                fmt.model_name,
                backend=fmt.backend,
                platform=fmt.platform,
                artifact_filename=fmt.artifact_filename,
                tensors=fmt.tensors,
                parameters=fmt.parameters,
                input_size_px=self.spec.input_size_px,
                classes=len(self.spec.class_names),
                max_batch=self.options.max_batch,
                instances=instances,
                instance_kind=self.options.instance_kind,
                versions_loaded=versions_loaded,
            )

        new = build(self.options.versions_loaded)
        old = _read_config(self.repository / fmt.model_name)
        if old is None or (list(old.input) == list(new.input) and list(old.output) == list(new.output)):
            return new
        return build(1)  # a model has one configuration: it cannot describe the version before as well

    def _stage_model(self, config: ModelConfig) -> None:
        self.publication.stage(f"{config.name}/{CONFIG_FILENAME}", to_text(config).encode())
        self.publication.stage(f"{config.name}/{LABELS_FILENAME}", self.labels.encode())

    def _stage_preprocess(self) -> int:
        version, source = _preprocess_source(self.repository)
        self.publication.stage(f"{PREPROCESS_MODEL}/{version}/{source.name}", source.read_bytes())
        config = preprocess_config(
            input_size_px=self.spec.input_size_px,
            max_batch=self.options.max_batch,
            instances=self.options.instances,
            max_tile_bytes=MAX_TILE_BYTES,
            max_tile_pixels=MAX_TILE_PIXELS,
        )
        self.publication.stage(f"{PREPROCESS_MODEL}/{CONFIG_FILENAME}", to_text(config).encode())
        return version

    def _release_json(self, origin: Mapping[str, Any], exported: ExportedFormat, artifact: Artifact) -> str:
        return _compact(
            {
                "format": RELEASE_FORMAT,
                "version": RELEASE_FORMAT_VERSION,
                "release": self.version,
                "network": exported.model,
                "artifact_sha256": exported.artifact_sha256,
                "files": {name: _sha256(content) for name, content in sorted(artifact.files.items())},
                "checkpoint": origin,
                "parity": dataclasses.asdict(exported.parity) if exported.parity is not None else None,
                "acceptance": dataclasses.asdict(exported.acceptance),
                "notes": exported.notes,
                "created_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
        )


def exported_format(
    fmt: ServedFormat,
    artifact: Artifact,
    measured: Parity | None,
    acceptance: Acceptance,
    classifiers: Sequence[str] = (),
) -> ExportedFormat:
    """What is said of a format in the release; without classifiers it was not published."""
    return ExportedFormat(
        fmt.model_name,
        tuple(classifiers),
        artifact.size_bytes,
        _sha256(artifact.files[fmt.artifact_filename]),
        measured,
        acceptance,
        artifact.notes,
    )


def _preprocess_source(repository: Path) -> tuple[int, Path]:
    """Version and file of the hand-written preprocess model: the one of this checkout, else the repository's own."""
    for model in (_HAND_WRITTEN_PREPROCESS, repository / PREPROCESS_MODEL):
        for version in sorted(_versions(model), reverse=True):
            if (model / str(version) / "model.py").is_file():
                return version, model / str(version) / "model.py"
    raise RepositoryError(
        f"The preprocess model is not at {_HAND_WRITTEN_PREPROCESS}. Run the exporter from a checkout of Clotline, or "
        f"copy {PREPROCESS_MODEL} into the repository first."
    )


def _refuse_to_strand(repository: Path, exported: set[str], input_size_px: int, max_batch: int) -> None:
    """All ensembles share `tile_preprocess`; one that is not exported anew must still fit to it."""
    for model in sorted(repository.glob(f"{NETWORK_PREFIX}*")):
        config = _read_config(model)
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


def _read_config(model: Path) -> ModelConfig | None:
    path = model / CONFIG_FILENAME
    try:
        return from_text(path.read_text(encoding="utf-8"), origin=str(path)) if path.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise RepositoryError(
            f"{path} cannot be read: {error}. Repair or delete it, then export again."
        ) from error


def _versions(model: Path) -> list[int]:
    if not model.is_dir():
        return []
    return [int(entry.name) for entry in model.iterdir() if entry.name.isdecimal() and entry.is_dir()]


def _compact(document: Mapping[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
