"""What a slide release is made of: a slide checkpoint, a tile checkpoint, or an ensemble of either kind.

All three become the same thing, members and a definition of how they are joined, so that everything after it has
one way to go.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from exporters.checkpoint_entry import checkpoint_entry
from exporters.parity import one_torch_thread
from exporters.slide.head import MeanHead, MemberHead
from slides.decode import decode_tile
from slides.errors import SlidesError
from slides.spec import ModelSpec
from training import checkpoint as tile_checkpoint
from training.ensembles.combination import Combination
from training.ensembles.definition import Ensemble, Member
from training.errors import CheckpointError, EnsembleError
from training.mil import checkpoint as slide_checkpoint
from training.mil.heads import ServedHead
from training.network import ServedNetwork

TILE, SLIDE, ENSEMBLE = "tile", "slide", "ensemble"
ENSEMBLE_NAME = "ensemble.json"
_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Bag:
    """Encoded tiles of one slide, with its true class where that is known."""

    image_id: str
    label: str | None
    tiles: tuple[bytes, ...]


@dataclasses.dataclass(frozen=True)
class BagChoice:
    """Which of a slide's tiles make the bag that networks were judged by.

    Attributes:
        tiles: how many; 0 for all of them.
        choice: "darkest", or "even" for evenly spaced ones.
    """

    tiles: int = 0
    choice: str = "even"


@dataclasses.dataclass(frozen=True)
class SlideMember:
    """One network of a slide release.

    Attributes:
        kind: "tile" or "slide".
        origin: what a manifest says of it: architecture, hashes of weights, git_commit ...
        spec: its own.
        encoder: float32 [N, 3, S, S] normalised RGB -> embedding float32 [N, D].
        head: from its embeddings to the slide's answer.
        bag: by which it was judged.
        golden_bags: that its checkpoint holds.
        embed: what PyTorch makes of decoded tiles, uint8 [N, S, S, 3] -> FP32 [N, D]; the reference, which shares no code with
            what is exported.
        pool: what PyTorch makes of embeddings FP32 [T, D]: probabilities [K] in its own order, attention [T].
    """

    kind: str
    origin: Mapping[str, Any]
    spec: ModelSpec
    encoder: nn.Module
    head: MemberHead
    bag: BagChoice
    golden_bags: tuple[Bag, ...]
    embed: Callable[[np.ndarray], np.ndarray]
    pool: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class SlideSource:
    """Members and how they are joined.

    Attributes:
        kind: "tile", "slide" or "ensemble".
        spec: what a client cuts, and the classes in the order of the answer.
        definition: of a single network, an ensemble of one.
        origin: the manifest's entry "checkpoint".
        manifests: of the members' checkpoints.
    """

    kind: str
    spec: ModelSpec
    members: tuple[SlideMember, ...]
    definition: Ensemble
    bag: BagChoice
    origin: Mapping[str, Any]
    manifests: tuple[Mapping[str, Any], ...]

    @property
    def golden_bags(self) -> tuple[Bag, ...]:
        """Those of all members, each once."""
        return tuple(dict.fromkeys(bag for member in self.members for bag in member.golden_bags))


def kind_of(source: Path) -> str:
    """ "tile", "slide" or "ensemble".

    Raises:
        CheckpointError, EnsembleError: it is none of them.
    """
    return ENSEMBLE if _definition_path(source) is not None else tile_checkpoint.kind_of(source)


def read_source(source: Path) -> SlideSource:
    """Load a checkpoint, or an ensemble with the checkpoints of its members.

    Raises:
        CheckpointError: a checkpoint is missing or damaged.
        EnsembleError: the definition is, or its members cannot be served together; every problem is listed.
    """
    path = _definition_path(source)
    if path is not None:
        return _of_ensemble(path)
    member, manifest = _read_member(source)
    return of_member(member, manifest)


def of_member(member: SlideMember, manifest: Mapping[str, Any]) -> SlideSource:
    """A single network as an ensemble of one."""
    alone = Combination("soft", np.ones(1))
    definition = Ensemble(member.spec.class_names, (Member("network", ""),), alone)
    return SlideSource(
        member.kind, member.spec, (member,), definition, member.bag, member.origin, (manifest,)
    )


def of_tile_checkpoint(read: tile_checkpoint.Checkpoint) -> SlideMember:
    """A tile network: its probabilities are the embedding, their mean over the tiles the answer."""
    model = read.model
    served = ServedNetwork(model).eval()
    classes = len(read.spec.class_names)

    def pool(probabilities_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = len(probabilities_TK)
        mean_K = probabilities_TK.astype(np.float64).mean(axis=0)
        return mean_K.astype(np.float32), np.full(count, 1 / count, np.float32)

    return SlideMember(
        TILE,
        checkpoint_entry(read.manifest),
        read.spec,
        nn.Sequential(model.backbone, nn.Softmax(dim=1)),
        MemberHead(MeanHead(), classes, tuple(range(classes))),
        BagChoice(),
        _bags_of_tiles(read.golden_tiles),
        functools.partial(_embed, lambda tiles_NHWC: served(tiles_NHWC)[0]),
        pool,
    )


def of_slide_checkpoint(read: slide_checkpoint.SlideCheckpoint) -> SlideMember:
    """A multiple-instance learner: its encoder and its head."""

    def pool(embeddings_TD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        answer = read.pool(embeddings_TD)
        return answer.probabilities_K, answer.attention_T

    classes = len(read.spec.class_names)
    judged_by = read.bags.evaluation_tiles or read.bags.tiles
    choice = "darkest" if read.bags.choice == "darkest" else "even"
    return SlideMember(
        SLIDE,
        checkpoint_entry(read.manifest),
        read.spec,
        read.encoder.backbone,
        MemberHead(ServedHead(read.head), read.encoder.feature_dim, tuple(range(classes))),
        BagChoice() if judged_by >= read.spec.tiles_per_slide else BagChoice(judged_by, choice),
        tuple(Bag(bag.image_id, bag.label, bag.tiles) for bag in read.golden_bags),
        functools.partial(_embed, read.encoder),
        pool,
    )


def _definition_path(source: Path) -> Path | None:
    """Where the definition lies, if it is one that `source` names."""
    if source.is_dir():
        inside = source / ENSEMBLE_NAME
        return inside if inside.is_file() and not (source / tile_checkpoint.MANIFEST_NAME).exists() else None
    return source if source.suffix == ".json" else None


def _read_member(directory: Path) -> tuple[SlideMember, Mapping[str, Any]]:
    if tile_checkpoint.kind_of(directory) == SLIDE:
        slide = slide_checkpoint.load(directory)
        return of_slide_checkpoint(slide), slide.manifest
    tile = tile_checkpoint.load(directory)
    return of_tile_checkpoint(tile), tile.manifest


def _of_ensemble(path: Path) -> SlideSource:
    definition = Ensemble.load(path)
    lacking = [member.name for member in definition.members if member.checkpoint is None]
    if lacking:
        raise EnsembleError(
            str(path),
            [
                f"member {name!r} names no checkpoint; make the ensemble again with --checkpoints, one a member"
                for name in lacking
            ],
        )
    members, manifests, problems = [], [], []
    for entry in definition.members:
        directory = _checkpoint_of(path, str(entry.checkpoint))
        try:
            member, manifest = _read_member(directory)
        except (CheckpointError, SlidesError) as error:
            problems.append(f"member {entry.name!r}: {error}")
            continue
        problems += [f"member {entry.name!r}: {problem}" for problem in _misfits(definition, member)]
        members.append(member)
        manifests.append(manifest)
    if members:
        problems += _differences(definition, members)
    if problems:
        raise EnsembleError(str(path), problems)
    spec = dataclasses.replace(members[0].spec, class_names=definition.class_names)
    ordered = tuple(_in_order(member, definition.class_names) for member in members)
    origin = {
        "kind": ENSEMBLE,
        "method": definition.combination.method,
        "temperature": definition.combination.temperature,
        "abstention": dataclasses.asdict(definition.abstention) if definition.abstention else None,
        "members": [
            {"name": entry.name, **member.origin}
            for entry, member in zip(definition.members, members, strict=True)
        ],
        "metrics": {
            f"{unit}_{name}": value
            for unit in ("slide", "patient")
            for name, value in definition.scores.get(unit, {}).items()
        },
    }
    return SlideSource(ENSEMBLE, spec, ordered, definition, members[0].bag, origin, tuple(manifests))


def _checkpoint_of(path: Path, named: str) -> Path:
    """As named from where the command runs, or beside the definition."""
    directory = Path(named)
    beside = path.parent / directory
    return beside if not directory.exists() and beside.exists() else directory


def _misfits(definition: Ensemble, member: SlideMember) -> list[str]:
    if set(member.spec.class_names) == set(definition.class_names):
        return []
    return [
        f"its classes are {', '.join(member.spec.class_names)}, the ensemble's {', '.join(definition.class_names)}"
    ]


def _differences(definition: Ensemble, members: Sequence[SlideMember]) -> list[str]:
    """What keeps members from seeing the same tiles; normalisation and the order of classes may differ."""
    problems = []
    for field in dataclasses.fields(ModelSpec):
        if field.name in ("class_names", "mean", "std"):
            continue
        values = [getattr(member.spec, field.name) for member in members]
        if len(set(values)) > 1:
            problems.append(
                f"members differ in {field.name} ({_each(definition, values)}); all of them get the same tiles"
            )
    bags = [member.bag for member in members]
    if len(set(bags)) > 1:
        told = [f"{bag.tiles or 'all'} {bag.choice} tiles" if bag.tiles else "all tiles" for bag in bags]
        problems.append(f"members were judged by different bags ({_each(definition, told)})")
    return problems


def _each(definition: Ensemble, values: Sequence[object]) -> str:
    names = [member.name for member in definition.members]
    return ", ".join(f"{name}: {value}" for name, value in zip(names, values, strict=False))


def _in_order(member: SlideMember, class_names: Sequence[str]) -> SlideMember:
    order_K = tuple(member.spec.class_names.index(name) for name in class_names)
    return dataclasses.replace(member, head=dataclasses.replace(member.head, order_K=order_K))


def _bags_of_tiles(golden: Sequence[tile_checkpoint.GoldenTile]) -> tuple[Bag, ...]:
    """Golden tiles of one slide are a bag."""
    of_slide: dict[tuple[str, str], list[bytes]] = {}
    for tile in golden:
        of_slide.setdefault((tile.image_id, tile.label), []).append(tile.data)
    return tuple(Bag(image_id, label, tuple(tiles)) for (image_id, label), tiles in of_slide.items())


def _embed(
    reference: Callable[[torch.Tensor], torch.Tensor] | nn.Module, tiles_NHWC: np.ndarray
) -> np.ndarray:
    with one_torch_thread(), torch.inference_mode():
        parts = [reference(part) for part in torch.from_numpy(tiles_NHWC).split(_BATCH)]
    return torch.cat(parts).numpy()


def decoded(bag: Bag, size_px: int) -> np.ndarray:
    """The tiles of a bag as the server decodes them: uint8 [T, S, S, 3] RGB."""
    return np.stack([decode_tile(tile, size_px) for tile in bag.tiles])
