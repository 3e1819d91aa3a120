"""What a Clotline slide classifier is asked and answers: one bag of tiles a slide. No I/O here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clients.errors import AnswerError, ModelMismatch

if TYPE_CHECKING:
    from slides.tissue import TileRef

INPUT = "tiles"
OUTPUTS = (
    "probabilities",
    "confidence",
    "label_index",
    "attention",
    "entropy",
    "mutual_information",
    "std",
    "answered",
    "release",
)
SUM_TOLERANCE = 1e-3
CHOICES = ("darkest", "even")


@dataclasses.dataclass(frozen=True)
class BagCard:
    """What the server's configuration of a slide classifier says of bags.

    Attributes:
        max_tiles: tiles that one bag may hold.
        max_bytes: of all tiles of a bag together.
        tiles: how many of a slide's tiles make the bag by which the model was judged; 0 for all.
        choice: "darkest", or "even" for evenly spaced ones.
    """

    max_tiles: int
    max_bytes: int
    tiles: int = 0
    choice: str = "even"

    def chosen(self, refs: Sequence[TileRef]) -> list[TileRef]:
        """The tiles of a slide that make its bag, as in training; in the order of `refs`, or darkest first."""
        count = len(refs)
        if not self.tiles or count <= self.tiles:
            return list(refs)
        if self.choice == "darkest":
            return sorted(refs, key=lambda ref: -ref.darkness)[: self.tiles]
        return [refs[(2 * place + 1) * count // (2 * self.tiles)] for place in range(self.tiles)]


@dataclasses.dataclass(frozen=True)
class BagAnswer:
    """The answer for one slide.

    Attributes:
        probabilities_K: float32 [K], sum 1.
        label_index: of the class that the model names.
        attention_T: float32 [T], of each tile, sum 1.
        entropy: of the answer, nats.
        mutual_information: nats, what the members of an ensemble disagree about; 0 for a single network.
        std: between members of the probability of the class that they prefer; 0 for a single network.
        answered: False where an ensemble abstains.
        release: which release answered.
    """

    probabilities_K: NDArray[np.float32]
    label_index: int
    attention_T: NDArray[np.float32]
    entropy: float
    mutual_information: float
    std: float
    answered: bool
    release: str


def read_bag_card(name: str, parameters: Mapping[str, str]) -> BagCard:
    """What a slide classifier's parameters say of bags.

    Raises:
        ModelMismatch: a limit or choice is missing, or none.
    """
    try:
        choice = json.loads(parameters.get("clotline_bag") or "{}")
        card = BagCard(int(parameters["max_tiles"]), int(parameters["max_bag_bytes"]), **choice)
        if card.choice not in CHOICES or card.tiles < 0:
            raise ValueError(f"clotline_bag {choice}")
    except (KeyError, TypeError, ValueError) as error:
        raise ModelMismatch(
            f"model {name!r}: its parameters of bags do not hold: {error!r}; ask for a model that `python -m exporters "
            "export` wrote (slide_classifier)"
        ) from error
    return card


def check_bag_answer(
    outputs: Mapping[str, NDArray[Any] | None], *, tile_count: int, class_count: int, source: str
) -> BagAnswer:
    """The outputs of one request as BagAnswer.

    Args:
        outputs: output name -> array, None where the server sent none.
        source: model and server, for messages.

    Raises:
        AnswerError: an output is missing, has another shape, holds NaN or infinity, or values that are no distribution.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for name in OUTPUTS:
        shape = {"probabilities": (class_count,), "attention": (tile_count,)}.get(name, (1,))
        array = outputs.get(name)
        if array is None or array.shape != shape:
            told = "without it" if array is None else f"with shape {list(array.shape)}"
            raise AnswerError(f"{source}: {name} of shape {list(shape)} was expected; answered {told}")
        arrays[name] = array
    for name in ("probabilities", "attention"):
        values = arrays[name]
        if not (np.isfinite(values).all() and (values >= 0).all() and abs(values.sum() - 1) <= SUM_TOLERANCE):
            raise AnswerError(f"{source}: {name} are no distribution: {values.tolist()[:8]}")
    label_index = int(arrays["label_index"][0])
    if not 0 <= label_index < class_count:
        raise AnswerError(f"{source}: label_index is {label_index}, expected 0..{class_count - 1}")
    unsure = {name: float(arrays[name][0]) for name in ("entropy", "mutual_information", "std")}
    if not all(map(np.isfinite, unsure.values())):
        raise AnswerError(f"{source}: the uncertainty is not finite: {unsure}")
    release = arrays["release"][0]
    return BagAnswer(
        arrays["probabilities"].astype(np.float32),
        label_index,
        arrays["attention"].astype(np.float32),
        answered=bool(arrays["answered"][0]),
        release=release.decode(errors="replace") if isinstance(release, bytes) else str(release),
        **unsure,
    )
