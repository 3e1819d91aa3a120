from __future__ import annotations

import pytest

from demo.scores import accuracy, auc, by_patient, scored


def rows(*values: tuple[str, float]) -> list:
    return [scored(f"s{n}", truth, {"CE": 1 - p, "LAA": p}) for n, (truth, p) in enumerate(values)]


def test_the_label_is_the_most_probable_class() -> None:
    assert scored("a", "LAA", {"CE": 0.25, "LAA": 0.75}).right
    assert not scored("a", "LAA", {"CE": 0.75, "LAA": 0.25}).right
    assert scored("a", "CE", {"CE": 0.5, "LAA": 0.5}).label == "CE"


def test_auc_counts_pairs_in_the_right_order() -> None:
    assert auc(rows(("CE", 0.1), ("CE", 0.6), ("LAA", 0.5), ("LAA", 0.9))) == pytest.approx(0.75)


def test_auc_is_undefined_for_one_class() -> None:
    assert auc(rows(("CE", 0.1), ("CE", 0.6))) is None
    assert auc([]) is None


def test_accuracy_is_the_share_of_right_labels() -> None:
    assert accuracy(rows(("CE", 0.1), ("CE", 0.6), ("LAA", 0.9), ("LAA", 0.8))) == 0.75
    assert accuracy([]) is None


def test_a_patient_is_the_mean_of_their_images() -> None:
    images = rows(("CE", 0.2), ("LAA", 0.9), ("CE", 0.6))
    first, second = by_patient(images, {"s0": "a", "s1": "b", "s2": "a"})
    assert (first.name, first.truth, first.label) == ("a", "CE", "CE")
    assert first.probabilities["LAA"] == pytest.approx(0.4)
    assert second.name == "b"
    assert by_patient([], {}) == []
