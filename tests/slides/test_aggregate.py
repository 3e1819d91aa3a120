from __future__ import annotations

import numpy as np
import pytest

from slides.aggregate import mean_probabilities, slides_to_patients
from slides.errors import AggregationError


def test_mean_over_tiles_is_a_float64_sum_in_any_order() -> None:
    probabilities_NK = np.random.default_rng(0).dirichlet((1, 1, 1), 1000).astype(np.float32)
    mean_K = mean_probabilities(probabilities_NK)
    assert mean_K.dtype == np.float64
    assert mean_K.shape == (3,)
    np.testing.assert_allclose(mean_K, mean_probabilities(probabilities_NK[::-1]), rtol=0, atol=1e-15)
    np.testing.assert_allclose(mean_probabilities([[1, 0], [0, 1], [0, 1], [0, 1]]), [0.25, 0.75])


@pytest.mark.parametrize(
    "bad", [[], [0.5, 0.5], np.zeros((0, 2)), np.zeros((2, 0)), [["a", "b"]], [[1], [1, 2]]]
)
def test_wrong_shapes_are_refused(bad: object) -> None:
    with pytest.raises(AggregationError):
        mean_probabilities(bad)  # type: ignore[arg-type]


def test_a_value_that_is_not_finite_names_its_tile() -> None:
    with pytest.raises(AggregationError, match="tile 1"):
        mean_probabilities([[0.5, 0.5], [np.nan, 0.5]])


def test_slides_of_a_patient_weigh_the_same() -> None:
    slides = {"b_0": [0.2, 0.8], "a_0": [1.0, 0.0], "a_1": [0.5, 0.5]}
    patients = slides_to_patients(slides, {"a_0": "a", "a_1": "a", "b_0": "b", "c_0": "c"})
    assert list(patients) == ["b", "a"]
    np.testing.assert_allclose(patients["a"], [0.75, 0.25])


def test_slide_without_patient_and_different_classes() -> None:
    with pytest.raises(AggregationError, match="'a_0' has probabilities but no patient"):
        slides_to_patients({"a_0": [1.0, 0.0]}, {})
    with pytest.raises(AggregationError, match=r"2 probabilities.*3"):
        slides_to_patients({"a": [1, 0], "b": [1, 0, 0]}, {"a": "p", "b": "q"})
