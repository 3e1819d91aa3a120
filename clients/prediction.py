"""What the client answers: a prediction a tile, a slide and a patient. No I/O here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slides.aggregate import mean_probabilities, slides_to_patients

if TYPE_CHECKING:
    from clients.bags import BagAnswer
    from slides.tissue import TileRef


@dataclasses.dataclass(frozen=True)
class TilePrediction:
    """One tile's place on the slide and its probabilities.

    Attributes:
        x_px, y_px: upper left corner in level-0 pixels.
        side_px: side of the square in level-0 pixels.
        tissue_share: 0..1, share of the tile that is tissue.
        probabilities: class name -> 0..1; empty where a slide classifier answered, which has none of tiles.
        attention: 0..1, how much of the slide's answer rests on it (all tiles sum to 1); None where a tile classifier
            answered, whose tiles all count the same.
    """

    x_px: int
    y_px: int
    side_px: int
    tissue_share: float
    probabilities: Mapping[str, float]
    attention: float | None = None


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer for one slide: the mean over its tiles, or what a slide classifier makes of them.

    Attributes:
        image_id: name of the slide, its file name without suffix.
        patient_id: patient the slide belongs to.
        label: class with the highest probability (of equals the first in the model's order).
        confidence: 0..1, probability of `label`.
        probabilities: class name -> 0..1, in the model's order; they sum to 1.
        tiles: the tiles asked about, in the order in which they were taken.
        model: name of the model on the server.
        model_version: version that answered for every tile.
        slide_size_px: level-0 (width, height).
        um_per_px: level-0 resolution in micrometres per pixel, as the slide states it or as it was given.
        answered: False where the model abstains: label and probabilities are there, and are not to be relied on.
        entropy: of the probabilities, nats; None where a tile classifier answered.
        mutual_information: nats, what the members of an ensemble disagree about; None where a tile classifier answered.
        release: which release answered, as the server says; None where it does not.
    """

    image_id: str
    patient_id: str
    label: str
    confidence: float
    probabilities: Mapping[str, float]
    tiles: tuple[TilePrediction, ...]
    model: str
    model_version: str
    slide_size_px: tuple[int, int]
    um_per_px: float
    answered: bool = True
    entropy: float | None = None
    mutual_information: float | None = None
    release: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON types; keys are the attributes' names."""
        return _json_types(self)


@dataclasses.dataclass(frozen=True)
class PatientPrediction:
    """The answer for one patient: the mean over slides, each of equal weight.

    Attributes:
        image_ids: the slides it rests on.
    """

    patient_id: str
    label: str
    confidence: float
    probabilities: Mapping[str, float]
    image_ids: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON types; keys are the attributes' names."""
        return _json_types(self)


def slide_prediction(
    refs: Sequence[TileRef],
    probabilities_NK: NDArray[np.float32],
    class_names: Sequence[str],
    *,
    image_id: str,
    patient_id: str,
    model: str,
    model_version: str,
    slide_size_px: tuple[int, int],
    um_per_px: float,
) -> Prediction:
    """The prediction of a slide from those of its tiles.

    Args:
        refs: the N tiles.
        probabilities_NK: [N, K], row n for `refs[n]`, column k for `class_names[k]`.

    Raises:
        slides.errors.AggregationError: no tile, or values that are not finite.
    """
    mean_K = mean_probabilities(probabilities_NK)
    index = int(np.argmax(mean_K))
    tiles = tuple(
        TilePrediction(ref.x_px, ref.y_px, ref.side_px, ref.tissue_share, _by_class(class_names, row_K))
        for ref, row_K in zip(refs, probabilities_NK, strict=True)
    )
    return Prediction(
        image_id=image_id,
        patient_id=patient_id,
        label=class_names[index],
        confidence=float(mean_K[index]),
        probabilities=_by_class(class_names, mean_K),
        tiles=tiles,
        model=model,
        model_version=model_version,
        slide_size_px=slide_size_px,
        um_per_px=um_per_px,
    )


def bag_prediction(
    refs: Sequence[TileRef],
    answer: BagAnswer,
    class_names: Sequence[str],
    *,
    image_id: str,
    patient_id: str,
    model: str,
    model_version: str,
    slide_size_px: tuple[int, int],
    um_per_px: float,
) -> Prediction:
    """The prediction of a slide from a slide classifier's answer.

    Args:
        refs: the T tiles of the bag, in the order in which they were sent.
    """
    tiles = tuple(
        TilePrediction(ref.x_px, ref.y_px, ref.side_px, ref.tissue_share, {}, float(weight))
        for ref, weight in zip(refs, answer.attention_T, strict=True)
    )
    return Prediction(
        image_id=image_id,
        patient_id=patient_id,
        label=class_names[answer.label_index],
        confidence=float(answer.probabilities_K[answer.label_index]),
        probabilities=_by_class(class_names, answer.probabilities_K),
        tiles=tiles,
        model=model,
        model_version=model_version,
        slide_size_px=slide_size_px,
        um_per_px=um_per_px,
        answered=answer.answered,
        entropy=answer.entropy,
        mutual_information=answer.mutual_information,
        release=answer.release,
    )


def patient_predictions(predictions: Sequence[Prediction]) -> list[PatientPrediction]:
    """One prediction a patient, in the order in which patients first appear.

    Raises:
        ValueError: a slide appears twice, or slides have different classes.
    """
    patients = {prediction.image_id: prediction.patient_id for prediction in predictions}
    if len(patients) < len(predictions):
        raise ValueError("a slide appears twice among the predictions; it would count twice for its patient")
    if len({tuple(prediction.probabilities) for prediction in predictions}) > 1:
        raise ValueError("the predictions have different classes; they come from different models")
    means = slides_to_patients(
        {prediction.image_id: list(prediction.probabilities.values()) for prediction in predictions}, patients
    )
    answers = []
    for patient_id, mean_K in means.items():
        class_names = list(predictions[0].probabilities)
        index = int(np.argmax(mean_K))
        image_ids = tuple(image_id for image_id, patient in patients.items() if patient == patient_id)
        answers.append(
            PatientPrediction(
                patient_id,
                class_names[index],
                float(mean_K[index]),
                _by_class(class_names, mean_K),
                image_ids,
            )
        )
    return answers


def _by_class(class_names: Sequence[str], values_K: NDArray[Any]) -> dict[str, float]:
    return {name: float(value) for name, value in zip(class_names, values_K, strict=True)}


def _json_types(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _json_types(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_json_types(entry) for entry in value]
    return dict(value) if isinstance(value, Mapping) else value
