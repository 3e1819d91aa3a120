"""Slide checkpoints: encoder and head of a multiple-instance learner, in files of their own.

checkpoint.json        the manifest of `training.checkpoint`, of kind "slide"
encoder.safetensors    tiles uint8 [N, S, S, 3] to embeddings FP32 [N, D]
head.safetensors       embeddings of a slide's tiles to its probabilities and attention
golden_bags/0000/      the encoded tiles of a held-out bag; what is exported or served later is compared on them

The encoder can be served by itself, batched over the tiles of many slides; the head is small.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray

from slides.decode import decode_tile
from slides.errors import SlidesError
from slides.spec import ModelSpec
from training import checkpoint
from training.errors import ArchitectureError, CheckpointError
from training.mil.heads import ServedHead, SlideHead
from training.mil.network import ENCODER_BATCH, build_encoder, build_head
from training.mil.options import BagOptions
from training.network import TileEncoder

ENCODER_NAME = "encoder.safetensors"
HEAD_NAME = "head.safetensors"
_GOLDEN_NAME = re.compile(r"golden_bags/[0-9]+/[0-9]+\.(jpg|png)")


@dataclasses.dataclass(frozen=True)
class SlideAnswer:
    """What a slide checkpoint says of a bag.

    Attributes:
        probabilities_K: FP32 [K], of the slide.
        attention_T: FP32 [T], of each tile in the bag; it sums to 1.
    """

    probabilities_K: NDArray[np.float32]
    attention_T: NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class GoldenBag:
    """A bag of a held-out slide that travels with the checkpoint.

    Attributes:
        label: true class of the slide.
        tiles: encoded, JPEG or PNG.
        probabilities: what encoder and head answered, one FP32 value a class.
        attention: one FP32 value a tile.
        x_px, y_px: of the tiles in the slide's level 0; empty where not known.
    """

    image_id: str
    label: str
    tiles: tuple[bytes, ...]
    probabilities: tuple[float, ...]
    attention: tuple[float, ...]
    x_px: tuple[int, ...] = ()
    y_px: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class SlideCheckpoint:
    """A loaded slide checkpoint; encoder and head are in evaluation mode on `device`.

    Attributes:
        manifest: checkpoint.json as it is.
    """

    encoder: TileEncoder
    head: SlideHead
    spec: ModelSpec
    bags: BagOptions
    manifest: dict[str, Any]
    golden_bags: tuple[GoldenBag, ...]
    device: str | torch.device = "cpu"

    def embed(self, tiles: Sequence[bytes]) -> NDArray[np.float32]:
        """Embeddings FP32 [T, D] of encoded tiles, in memory for a few tiles however many there are.

        Raises:
            TileDecodeError: a tile is no JPEG or PNG.
            ValueError: there is no tile.
        """
        if not len(tiles):
            raise ValueError("a bag needs one tile at least")
        embedded = []
        with torch.inference_mode():
            for start in range(0, len(tiles), ENCODER_BATCH):
                chunk = [
                    decode_tile(tiles[row], self.spec.input_size_px)
                    for row in range(start, min(start + ENCODER_BATCH, len(tiles)))
                ]
                decoded_NHWC = torch.from_numpy(np.stack(chunk)).to(self.device)
                embedded.append(self.encoder(decoded_NHWC).cpu().numpy())
        return np.concatenate(embedded)

    def pool(self, embeddings_TD: NDArray[np.float32]) -> SlideAnswer:
        """The slide's answer from the embeddings of its bag, FP32 [T, D]."""
        with torch.inference_mode():
            probabilities_K, attention_T = ServedHead(self.head)(
                torch.from_numpy(np.ascontiguousarray(embeddings_TD)).to(self.device)
            )
        return SlideAnswer(probabilities_K.cpu().numpy(), attention_T.cpu().numpy())

    def answer(self, tiles: Sequence[bytes]) -> SlideAnswer:
        """The slide's answer from a bag of encoded tiles; raises as `embed`."""
        return self.pool(self.embed(tiles))


def save(
    directory: Path | str,
    encoder: TileEncoder,
    head: SlideHead,
    spec: ModelSpec,
    *,
    architecture: str,
    bags: BagOptions,
    metrics: Mapping[str, float],
    data: Mapping[str, Any],
    golden_bags: Sequence[GoldenBag],
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a slide checkpoint aside, read it back, and rename it into place; arguments and errors as `checkpoint.save`."""
    directory = Path(directory)
    checkpoint.refuse_existing(directory, overwrite=overwrite)
    encoder_bytes, head_bytes = checkpoint.weights_of(encoder), checkpoint.weights_of(head)
    golden, files = [], {ENCODER_NAME: encoder_bytes, HEAD_NAME: head_bytes}
    for number, bag in enumerate(golden_bags):
        names = [
            f"golden_bags/{number:04d}/{place:04d}{checkpoint.suffix_of(tile)}"
            for place, tile in enumerate(bag.tiles)
        ]
        files.update(zip(names, bag.tiles, strict=True))
        entry = {key: value for key, value in dataclasses.asdict(bag).items() if key != "tiles"}
        golden.append({**entry, "files": names})
    manifest = {
        "format": checkpoint.FORMAT,
        "version": checkpoint.VERSION,
        "kind": checkpoint.SLIDE,
        "architecture": architecture,
        "spec": spec.as_dict(),
        "bags": bags.as_dict(),
        "embedding_dim": encoder.feature_dim,
        "metrics": dict(metrics),
        "data": dict(data),
        "encoder_sha256": hashlib.sha256(encoder_bytes).hexdigest(),
        "encoder_bytes": len(encoder_bytes),
        "head_sha256": hashlib.sha256(head_bytes).hexdigest(),
        "head_bytes": len(head_bytes),
        "golden_bags": golden,
        **(about or {}),
    }
    checkpoint.write(directory, manifest, files, proof=load)
    return directory


def load(directory: Path | str, device: str | torch.device = "cpu") -> SlideCheckpoint:
    """Rebuild encoder and head of a slide checkpoint.

    Raises:
        CheckpointVersionError: the manifest is of another format, version or unknown kind.
        CheckpointError: it is a checkpoint of tiles, a file is missing, truncated or altered, the manifest is
            incomplete, or the weights are not of the architecture that it names.
    """
    directory = Path(directory)
    manifest = checkpoint.read_manifest(directory, kind=checkpoint.SLIDE)
    try:
        spec = ModelSpec.from_dict(manifest["spec"])
        bags = BagOptions.model_validate(manifest["bags"])
        encoder = build_encoder(manifest["architecture"], spec, bags).module
        head = build_head(encoder.feature_dim, spec, bags)
    except pydantic.ValidationError as error:
        lines = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise CheckpointError(f"checkpoint {directory}: bags: {lines}") from error
    except (SlidesError, ArchitectureError) as error:
        raise CheckpointError(f"checkpoint {directory}: {error}") from error
    if encoder.feature_dim != manifest["embedding_dim"]:
        raise CheckpointError(
            f"checkpoint {directory}: its encoder gives embeddings of {encoder.feature_dim} values, the manifest "
            f"says {manifest['embedding_dim']}"
        )
    checkpoint.load_weights(encoder, directory, ENCODER_NAME, manifest, "encoder")
    checkpoint.load_weights(head, directory, HEAD_NAME, manifest, "head")
    golden = tuple(_golden_bag(directory, entry, spec) for entry in manifest["golden_bags"])
    return SlideCheckpoint(
        encoder.to(device).eval(), head.to(device).eval(), spec, bags, manifest, golden, device
    )


def _golden_bag(directory: Path, entry: Mapping[str, Any], spec: ModelSpec) -> GoldenBag:
    try:
        names = [str(name) for name in entry["files"]]
        strange = [name for name in names if not _GOLDEN_NAME.fullmatch(name)]
        if strange:
            raise ValueError(f"file {strange[0]!r} is not of the form golden_bags/0000/0000.jpg")
        bag = GoldenBag(
            image_id=str(entry["image_id"]),
            label=str(entry["label"]),
            tiles=tuple(checkpoint.read_file(directory, name) for name in names),
            probabilities=tuple(map(float, entry["probabilities"])),
            attention=tuple(map(float, entry["attention"])),
            x_px=tuple(map(int, entry["x_px"])),
            y_px=tuple(map(int, entry["y_px"])),
        )
        if not bag.tiles or len(bag.attention) != len(bag.tiles):
            raise ValueError(f"it has {len(bag.tiles)} tiles and {len(bag.attention)} values of attention")
        for tile in bag.tiles:
            decode_tile(tile, spec.input_size_px)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {directory}: golden bag {entry!r:.80} is not usable: {error}"
        ) from error
    return bag
