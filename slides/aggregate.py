"""From tiles to slides, from slides to patients: plain means of probabilities."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slides.errors import AggregationError


def mean_probabilities(probabilities_NK: ArrayLike) -> NDArray[np.float64]:
    """Mean over tiles.

    Args:
        probabilities_NK: [N, K] probabilities of N >= 1 tiles for K classes, any real dtype.

    Returns:
        float64 [K]. Summed in float64, so that the order of tiles does not show.

    Raises:
        AggregationError: not two axes, no tile, no class, or a value that is not finite.
    """
    try:
        values_NK = np.asarray(probabilities_NK, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise AggregationError(f"probabilities must be numbers of shape [N, K]: {error}") from error
    if values_NK.ndim != 2 or 0 in values_NK.shape:
        raise AggregationError(
            f"probabilities must have shape [N, K], at least one tile and class, not {list(values_NK.shape)}"
        )
    if not np.isfinite(values_NK).all():
        row = int(np.argwhere(~np.isfinite(values_NK))[0, 0])
        raise AggregationError(f"probabilities of tile {row} are not finite: {values_NK[row].tolist()}")
    return values_NK.mean(axis=0)


def slides_to_patients(
    probabilities: Mapping[str, ArrayLike], patient_ids: Mapping[str, str]
) -> dict[str, NDArray[np.float64]]:
    """Mean over the slides of each patient; every slide weighs the same, however many tiles it gave.

    Args:
        probabilities: image_id -> [K].
        patient_ids: image_id -> patient_id; may name more slides than `probabilities` holds.

    Returns:
        patient_id -> float64 [K], in the order in which patients first appear in `probabilities`.

    Raises:
        AggregationError: a slide without a patient, slides with different K, or values that are not finite.
    """
    of_patient: dict[str, list[NDArray[np.float64]]] = {}
    widths: dict[int, str] = {}
    for image_id, values in probabilities.items():
        if image_id not in patient_ids:
            raise AggregationError(f"slide {image_id!r} has probabilities but no patient")
        values_K = np.asarray(values, dtype=np.float64)
        if values_K.ndim != 1:
            raise AggregationError(
                f"slide {image_id!r}: probabilities must have shape [K], not {list(values_K.shape)}"
            )
        widths.setdefault(values_K.size, image_id)
        of_patient.setdefault(patient_ids[image_id], []).append(values_K)
    if len(widths) > 1:
        (first, first_id), (second, second_id) = list(widths.items())[:2]
        raise AggregationError(
            f"slide {first_id!r} has {first} probabilities, slide {second_id!r} has {second}"
        )
    return {patient_id: mean_probabilities(np.stack(rows_NK)) for patient_id, rows_NK in of_patient.items()}
