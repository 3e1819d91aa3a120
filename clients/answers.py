"""What a Clotline classifier tells of itself, and what a tile classifier answers, checked before anyone relies on it. No I/O
here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients import bags
from clients.bags import BagCard, read_bag_card
from clients.errors import AnswerError, ModelMismatch
from slides.errors import SpecError
from slides.spec import ModelSpec

INPUT = "tile"
OUTPUTS = ("probabilities", "confidence", "label_index")
SUM_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Question:
    """How a kind of model is asked.

    Attributes:
        input: name of the tensor of encoded tiles.
        outputs: names of what it answers.
        batched: tiles are a batch [N, 1] with an answer each; else a bag [T] with one answer.
    """

    input: str
    outputs: tuple[str, ...]
    batched: bool

    def shape(self, tiles: int) -> list[int]:
        """Of the input."""
        return [tiles, 1] if self.batched else [tiles]


TILES = Question(INPUT, OUTPUTS, batched=True)
BAGS = Question(bags.INPUT, bags.OUTPUTS, batched=False)


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What the server's configuration of a tile or slide classifier says.

    Attributes:
        name: the model's name on the server.
        version: the version that answers when none is asked for.
        spec: classes, tile geometry and normalisation that the model was trained with.
        max_batch: tiles that one request may hold, >= 1.
        bag: of a slide classifier, which answers for a bag of tiles; None for a tile classifier.
        checkpoint: where the network comes from (weights_sha256, git_commit, architecture, format), as
            exported.
    """

    name: str
    version: str
    spec: ModelSpec
    max_batch: int
    checkpoint: Mapping[str, Any]
    bag: BagCard | None = None


@dataclasses.dataclass(frozen=True)
class TileAnswers:
    """The answers for N tiles, in the order in which the tiles were given.

    Attributes:
        probabilities_NK: float32 [N, K], 0..1, one column a class in the order of `spec.class_names`.
        confidence_N: float32 [N], as the model computes it.
        label_index_N: int64 [N], column of the class that the model names.
    """

    probabilities_NK: NDArray[np.float32]
    confidence_N: NDArray[np.float32]
    label_index_N: NDArray[np.int64]


def read_model_card(name: str, version: str, config: Mapping[str, Any]) -> ModelCard:
    """The card of a model from its configuration as tritonclient gives it (snake_case keys, JSON types).

    Raises:
        ModelMismatch: the configuration has no usable `clotline_spec`, or is not that of a tile or slide classifier.
    """
    parameters = {key: entry.get("string_value", "") for key, entry in config.get("parameters", {}).items()}
    if "clotline_spec" not in parameters:
        raise ModelMismatch(
            f"model {name!r} has no parameter clotline_spec, so nobody knows what tiles it takes; ask for a "
            "model that `python -m exporters export` wrote (tile_classifier)"
        )
    try:
        spec = ModelSpec.from_json(parameters["clotline_spec"])
    except SpecError as error:
        raise ModelMismatch(f"model {name!r}: its parameter clotline_spec does not hold: {error}") from error
    inputs = [entry.get("name") for entry in config.get("input", [])]
    outputs = [entry.get("name") for entry in config.get("output", [])]
    if not any(
        inputs == [question.input] and set(question.outputs) <= set(outputs) for question in (TILES, BAGS)
    ):
        raise ModelMismatch(
            f"model {name!r} takes {inputs} and answers {outputs}; a tile classifier takes {[INPUT]} and "
            f"answers {list(OUTPUTS)}, a slide classifier takes {[bags.INPUT]}. Ask for tile_classifier or "
            "slide_classifier, not for one of its parts"
        )
    bag = read_bag_card(name, parameters) if inputs == [bags.INPUT] else None
    max_batch = bag.max_tiles if bag is not None else int(config.get("max_batch_size", 0))
    if max_batch < 1:
        raise ModelMismatch(f"model {name!r} has max_batch_size {max_batch}; a tile classifier takes batches")
    try:
        checkpoint = json.loads(parameters.get("clotline_checkpoint") or "{}")
    except ValueError as error:
        raise ModelMismatch(
            f"model {name!r}: its parameter clotline_checkpoint is no JSON: {error}"
        ) from error
    return ModelCard(name, version, spec, max_batch, checkpoint, bag)


def check_answers(
    outputs: Mapping[str, NDArray[Any] | None], *, tile_count: int, class_count: int, source: str
) -> TileAnswers:
    """The outputs of one request as TileAnswers.

    Args:
        outputs: output name -> array, None where the server sent none.
        tile_count: tiles in the request.
        class_count: K of the model's specification.
        source: model and server, for messages.

    Raises:
        AnswerError: an output is missing, has another shape, holds NaN or infinity, or rows that are no
            distribution.
    """
    shapes = {
        "probabilities": (tile_count, class_count),
        "confidence": (tile_count, 1),
        "label_index": (tile_count, 1),
    }
    arrays: dict[str, NDArray[Any]] = {}
    for name, shape in shapes.items():
        array = outputs.get(name)
        if array is None:
            raise AnswerError(f"{source}: answered without the output {name!r}")
        if array.shape != shape:
            raise AnswerError(f"{source}: {name} has shape {list(array.shape)}, expected {list(shape)}")
        arrays[name] = array
    probabilities_NK = arrays["probabilities"].astype(np.float32)
    confidence_N = arrays["confidence"][:, 0].astype(np.float32)
    label_index_N = arrays["label_index"][:, 0].astype(np.int64)
    hint = "the model or its backend is broken; try `python -m serving up` again and read its proofs"
    for name, values in (("probabilities", probabilities_NK), ("confidence", confidence_N[:, None])):
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            row = int(np.argmax(bad))
            raise AnswerError(
                f"{source}: {name} of tile {row} are not finite: {values[row].tolist()}; {hint}"
            )
    sums_N = probabilities_NK.sum(axis=1)
    bad = (np.abs(sums_N - 1) > SUM_TOLERANCE) | (probabilities_NK < 0).any(axis=1)
    if bad.any():
        row = int(np.argmax(bad))
        raise AnswerError(
            f"{source}: probabilities of tile {row} are no distribution: "
            f"{probabilities_NK[row].tolist()}; {hint}"
        )
    bad = (label_index_N < 0) | (label_index_N >= class_count)
    if bad.any():
        row = int(np.argmax(bad))
        raise AnswerError(
            f"{source}: label_index of tile {row} is {label_index_N[row]}, expected 0..{class_count - 1}"
        )
    return TileAnswers(probabilities_NK, confidence_N, label_index_N)


def empty_answers(class_count: int) -> TileAnswers:
    """The answers for no tile at all."""
    nothing = np.empty(0, np.float32)
    return TileAnswers(np.empty((0, class_count), np.float32), nothing, np.empty(0, np.int64))


def join_answers(parts: Sequence[TileAnswers]) -> TileAnswers:
    """The answers of several requests as one, in the order given; at least one part."""
    return TileAnswers(
        np.concatenate([part.probabilities_NK for part in parts]),
        np.concatenate([part.confidence_N for part in parts]),
        np.concatenate([part.label_index_N for part in parts]),
    )
