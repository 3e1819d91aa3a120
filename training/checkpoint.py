"""Checkpoints: a directory that rebuilds a trained network with nothing else.

checkpoint.json     the manifest: format, architecture, spec, scores, data, versions, recipe, SHA-256 of the weights
model.safetensors   the weights, FP32
golden_tiles/       held-out tiles as they travel; what is exported or served later is compared on them

That is a checkpoint of kind "tile", which is also what a manifest without `kind` means. One of kind "slide" has an
encoder and a head in place of the model, and is read and written by `training.mil.checkpoint`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from slides.decode import decode_tile
from slides.errors import SlidesError
from slides.spec import ModelSpec
from training import network
from training.errors import ArchitectureError, CheckpointError, CheckpointVersionError, OutputExistsError

FORMAT = "clotline.checkpoint"
VERSION = 1
MANIFEST_NAME = "checkpoint.json"
WEIGHTS_NAME = "model.safetensors"
PNG_SIGNATURE = b"\x89PNG"
TILE, SLIDE = "tile", "slide"
_LOADERS = {TILE: "training.checkpoint.load", SLIDE: "training.mil.checkpoint.load"}
_GOLDEN_NAME = re.compile(r"golden_tiles/[0-9]+\.(jpg|png)")
_REQUIRED: dict[str, type] = {"architecture": str, "spec": dict, "metrics": dict, "data": dict}
_REQUIRED_OF_KIND: dict[str, dict[str, type]] = {
    TILE: {"weights_sha256": str, "weights_bytes": int, "golden_tiles": list},
    SLIDE: {
        "bags": dict,
        "embedding_dim": int,
        "encoder_sha256": str,
        "encoder_bytes": int,
        "head_sha256": str,
        "head_bytes": int,
        "golden_bags": list,
    },
}


@dataclasses.dataclass(frozen=True)
class GoldenTile:
    """A held-out tile that travels with the checkpoint.

    Attributes:
        data: the encoded tile, JPEG or PNG.
        label: its true class.
        probabilities: what the trained network answered, one FP32 value a class.
    """

    image_id: str
    label: str
    data: bytes
    probabilities: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: in evaluation mode on the device asked for.
        manifest: checkpoint.json as it is.
    """

    model: network.TileNetwork
    spec: ModelSpec
    manifest: dict[str, Any]
    golden_tiles: tuple[GoldenTile, ...]


def save(
    directory: Path | str,
    model: network.TileNetwork,
    spec: ModelSpec,
    *,
    architecture: str,
    metrics: Mapping[str, float],
    data: Mapping[str, Any],
    golden_tiles: Sequence[GoldenTile],
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint aside, read it back, and rename it into place.

    Args:
        directory: does not exist yet, unless `overwrite`.
        metrics: scores on held-out data.
        data: what was learnt from: fingerprint, slides, patients, held_out_patients.
        about: further entries of the manifest (recipe, git_commit, versions, created_utc).

    Raises:
        OutputExistsError: `directory` exists and `overwrite` is False.
        CheckpointError: the directory cannot be written, or what was written does not load.
    """
    directory = Path(directory)
    refuse_existing(directory, overwrite=overwrite)
    weights = weights_of(model)
    golden = [
        {
            "file": f"golden_tiles/{number:04d}{suffix_of(tile.data)}",
            "image_id": tile.image_id,
            "label": tile.label,
            "probabilities": list(tile.probabilities),
        }
        for number, tile in enumerate(golden_tiles)
    ]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": architecture,
        "spec": spec.as_dict(),
        "metrics": dict(metrics),
        "data": dict(data),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "weights_bytes": len(weights),
        "golden_tiles": golden,
        **(about or {}),
    }
    files = {str(entry["file"]): tile.data for entry, tile in zip(golden, golden_tiles, strict=True)}
    write(directory, manifest, {**files, WEIGHTS_NAME: weights}, proof=load)
    return directory


def weights_of(model: nn.Module) -> bytes:
    """The state dict as the bytes of a safetensors file."""
    return safetensors.torch.save(
        {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    )


def suffix_of(tile: bytes) -> str:
    """Of the file for an encoded tile."""
    return ".png" if tile.startswith(PNG_SIGNATURE) else ".jpg"


def write(
    directory: Path,
    manifest: Mapping[str, Any],
    files: Mapping[str, bytes],
    *,
    proof: Callable[[Path], object],
) -> None:
    """Write a manifest and files aside, let `proof` read them, and rename them into place.

    Raises:
        CheckpointError: the directory cannot be written, or what was written does not load.
    """
    try:
        with replacing(directory) as staged:
            for name, data in files.items():
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                _write_synced(staged / name, data)
            text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            _write_synced(staged / MANIFEST_NAME, text.encode())
            proof(staged)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {directory} cannot be written: {error}; nothing was left behind"
        ) from error


def refuse_existing(directory: Path, *, overwrite: bool) -> None:
    """Raise OutputExistsError if `directory` exists and must not be replaced, CheckpointError if it cannot be made.

    Asked before training, so that hours of work do not end at a directory that nobody may write to.
    """
    ancestor = next(path for path in directory.absolute().parents if path.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{directory} cannot be written: {ancestor} is no directory that this user may write to"
        )
    if directory.exists() and not overwrite:
        raise OutputExistsError(
            f"{directory} exists already; give another directory, or --overwrite to replace it"
        )


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """An empty directory beside `directory` that takes its place when the block ends well, and goes away otherwise."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
    try:
        staged.chmod(0o755)
        yield staged
        old = staged.with_name(staged.name.replace(".partial-", ".old-"))
        if directory.exists():
            directory.rename(old)
        try:
            staged.rename(directory)
        except OSError:
            if old.exists():
                old.rename(directory)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def load(directory: Path | str, device: str | torch.device = "cpu") -> Checkpoint:
    """Rebuild the network of a checkpoint.

    Raises:
        CheckpointVersionError: the manifest is of another format or version.
        CheckpointError: a file is missing, truncated or altered, the manifest is incomplete, or the weights are not
            of the architecture that it names.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    try:
        spec = ModelSpec.from_dict(manifest["spec"])
        model = network.build(manifest["architecture"], spec)
    except (SlidesError, ArchitectureError) as error:
        raise CheckpointError(f"checkpoint {directory}: {error}") from error
    load_weights(model, directory, WEIGHTS_NAME, manifest, "weights")
    return Checkpoint(model.to(device).eval(), spec, manifest, _read_golden_tiles(directory, manifest, spec))


def load_weights(
    model: nn.Module, directory: Path, name: str, manifest: Mapping[str, Any], entry: str
) -> None:
    """Load a safetensors file into `model` if it is the one that the manifest's `<entry>_sha256` tells of.

    Raises:
        CheckpointError: it is missing, truncated, altered, or not of this network.
    """
    weights = read_file(directory, name)
    if len(weights) != manifest[f"{entry}_bytes"]:
        raise CheckpointError(
            f"{directory / name} has {len(weights)} bytes, {manifest[f'{entry}_bytes']} were written: it is "
            "truncated or of another checkpoint; copy the checkpoint again"
        )
    sha256 = hashlib.sha256(weights).hexdigest()
    if sha256 != manifest[f"{entry}_sha256"]:
        raise CheckpointError(
            f"{directory / name} has SHA-256 {sha256}, the manifest says {manifest[f'{entry}_sha256']}: it was "
            "altered or is of another checkpoint; copy the checkpoint again"
        )
    try:
        state = safetensors.torch.load(weights)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"checkpoint {directory}: {name}: {error}") from error
    _load_state(model, state, directory / name, manifest["architecture"])


def kind_of(directory: Path | str) -> str:
    """ "tile" or "slide"; raises as `read_manifest`."""
    return str(read_manifest(directory, kind=None).get("kind", TILE))


def read_manifest(directory: Path | str, *, kind: str | None = TILE) -> dict[str, Any]:
    """checkpoint.json, checked for format, version, kind and the entries that its loader needs; raises as `load`.

    Args:
        kind: "tile", "slide", or None for either.
    """
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    try:
        manifest = json.loads(read_file(directory, MANIFEST_NAME))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}; copy the checkpoint again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointVersionError(
            f"{path} has format {found!r}, not {FORMAT!r}: it is no checkpoint of Clotline"
        )
    if manifest.get("version") != VERSION:
        raise CheckpointVersionError(
            f"{path} has version {manifest.get('version')!r}, this Clotline reads version {VERSION}; "
            "use the Clotline that wrote it, or train again"
        )
    found_kind = manifest.get("kind", TILE)
    if found_kind not in _LOADERS:
        raise CheckpointVersionError(
            f"{path} has kind {found_kind!r}, this Clotline reads {' and '.join(map(repr, _LOADERS))}"
        )
    if kind is not None and found_kind != kind:
        raise CheckpointError(
            f"{directory} is a {found_kind} checkpoint, a {kind} checkpoint is wanted here; it is read by "
            f"{_LOADERS[found_kind]}"
        )
    problems = [
        f"{key} is missing"
        if key not in manifest
        else f"{key} must be {type_of_key.__name__}, not {manifest[key]!r:.80}"
        for key, type_of_key in {**_REQUIRED, **_REQUIRED_OF_KIND[found_kind]}.items()
        if not isinstance(manifest.get(key), type_of_key)
    ]
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}")
    return manifest


def _load_state(model: nn.Module, state: Mapping[str, torch.Tensor], path: Path, architecture: str) -> None:
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own.keys() - state.keys()]
    problems += [f"{name} is unknown" for name in state.keys() - own.keys()]
    problems += [
        f"{name} is {list(state[name].shape)}, not {list(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:3])
        raise CheckpointError(
            f"{path} does not hold the weights of {architecture!r}: {len(problems)} of {len(own)} "
            f"tensors do not fit ({shown}{'; ...' if len(problems) > 3 else ''})"
        )
    not_finite = sorted(name for name, value in state.items() if not torch.isfinite(value).all())
    if not_finite:
        raise CheckpointError(f"{path}: {', '.join(not_finite[:3])} hold values that are not finite")
    model.load_state_dict(dict(state))


def _read_golden_tiles(
    directory: Path, manifest: Mapping[str, Any], spec: ModelSpec
) -> tuple[GoldenTile, ...]:
    tiles = []
    for entry in manifest["golden_tiles"]:
        try:
            name, label, probabilities = (
                str(entry["file"]),
                str(entry["label"]),
                tuple(map(float, entry["probabilities"])),
            )
            if not _GOLDEN_NAME.fullmatch(name):
                raise ValueError(f"file {name!r} is not of the form golden_tiles/0000.jpg")
            tile = GoldenTile(str(entry["image_id"]), label, read_file(directory, name), probabilities)
            decode_tile(tile.data, spec.input_size_px)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {directory}: golden tile {entry!r:.80} is not usable: {error}"
            ) from error
        tiles.append(tile)
    return tuple(tiles)


def read_file(directory: Path, name: str) -> bytes:
    """A file of a checkpoint; CheckpointError where it is missing or cannot be read."""
    try:
        return (directory / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{directory / name} is missing; a checkpoint is the directory that training writes, with {MANIFEST_NAME}, "
            "weights (.safetensors) and golden tiles"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{directory / name} cannot be read: {error}") from error


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
