"""How often the alert's threshold is passed by chance, and how small a change passes it; simulated, tiles of a patient alike.

PSI and its bound are those of docker/prometheus/rules/drift.yml, whose own tests hold it to these formulae.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.random import Generator

from exporters.reference_profile import joined
from slides.appearance import STATISTICS
from training.reference_profile import histogram

EDGES = STATISTICS["brightness"]
TILES_A_PATIENT = 16
FLOOR, LIMIT, LEAST_PATIENTS = 0.0001, 0.25, 50


def values(generator: Generator, patients: int, moved_by: float, alike: float) -> np.ndarray:
    """A statistic of every tile.

    Args:
        moved_by: standard deviations.
        alike: share of the variance that is between patients; 1: a patient's tiles are all the same.
    """
    of_patient = generator.normal(0.55 + 0.12 * moved_by, 0.12 * np.sqrt(alike), (patients, 1))
    of_tile = generator.normal(0, 0.12 * np.sqrt(1 - alike), (patients, TILES_A_PATIENT))
    return (of_patient + of_tile).ravel()


def psi_and_chance(
    generator: Generator, reference: int, window: int, moved_by: float = 0.0, alike: float = 0.8
) -> tuple[float, float]:
    """PSI of a window against a reference of so many patients, and its bound."""
    buckets = joined(histogram(values(generator, reference, 0, alike), EDGES), EDGES, reference)
    edges = [float(edge) for edge, _ in buckets[:-1]]
    counts = np.array(histogram(values(generator, window, moved_by, alike), edges))
    p = np.maximum([share for _, share in buckets], FLOOR)
    q = np.maximum(counts / counts.sum(), FLOOR)
    freedom = len(buckets) - 1
    by_chance = (1 / reference + 1 / window) * (freedom + 3 * np.sqrt(2 * freedom))
    return float(((q - p) * np.log(q / p)).sum()), float(by_chance)


def firing_share(
    reference: int, window: int, moved_by: float = 0.0, alike: float = 0.8, *, times: int = 300
) -> float:
    """How often the alert's condition holds."""
    generator = np.random.default_rng(0)
    found = (psi_and_chance(generator, reference, window, moved_by, alike) for _ in range(times))
    return sum(psi > LIMIT + by_chance for psi, by_chance in found) / times


@pytest.mark.parametrize("reference", [10, 24, 60, 300])
@pytest.mark.parametrize("window", [LEAST_PATIENTS, 200])
@pytest.mark.parametrize(("alike", "most"), [(0.5, 0.01), (0.9, 0.01), (1.0, 0.04)])
def test_chance_alone_does_not_fire(reference: int, window: int, alike: float, most: float) -> None:
    assert firing_share(reference, window, alike=alike) <= most


@pytest.mark.parametrize(
    ("reference", "window", "moved_by"), [(24, 50, 2.5), (60, 50, 1.5), (60, 200, 1.25), (300, 200, 1.0)]
)
def test_a_change_of_that_many_standard_deviations_fires(
    reference: int, window: int, moved_by: float
) -> None:
    assert firing_share(reference, window, moved_by) >= 0.9


def test_without_the_bound_chance_would_fire() -> None:
    generator = np.random.default_rng(0)
    found = [psi_and_chance(generator, 60, LEAST_PATIENTS, alike=1.0)[0] for _ in range(200)]
    assert np.mean(np.array(found) > LIMIT) > 0.3
