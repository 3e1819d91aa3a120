"""What `slide_classifier` counts on a real tritonserver: an ensemble with abstention, good and bad bags."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton

from clients import SlideClient
from clients.errors import RequestRefused
from serving.embedded import triton_home
from serving.instances import instances
from slides.model_metrics import BAG_EDGES, HISTOGRAMS_EVERY_S
from tests.serving.conftest import wait_until
from tests.serving.test_metrics import scrape
from training.ensembles.definition import Abstention, Ensemble

from .conftest import SPEC, blotchy_tiles
from .test_served import Served, served  # noqa: F401  a fixture

MODEL = ("model", "slide_classifier")
THRESHOLD = 0.04


@pytest.fixture(scope="session")
def ensemble_path(ensemble_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It abstains where no class has 1 - THRESHOLD."""
    ensemble = Ensemble.load(ensemble_path)
    path = tmp_path_factory.mktemp("abstaining") / "ensemble.json"
    dataclasses.replace(ensemble, abstention=Abstention(0.1, THRESHOLD, 40)).save(path)
    return path


def ask(address: str, tiles: tuple[bytes, ...]) -> None:
    client = triton.InferenceServerClient(address)
    tensor = triton.InferInput("tiles", [len(tiles)], "BYTES")
    tensor.set_data_from_numpy(np.array(tiles, dtype=np.object_))
    try:
        client.infer("slide_classifier", [tensor])
    finally:
        client.close()


def test_slides_are_counted_exactly(served: Served) -> None:  # noqa: F811
    address = served.http_url.removeprefix("http://")
    metrics_url = next(state.metrics for state in instances(triton_home()) if state.http == address)

    def value(name: str, *labels: tuple[str, str]) -> float:
        return scrape(metrics_url)[(f"clotline_{name}", frozenset({MODEL, *labels}))]

    wait_until(lambda: any("clotline_bag_tiles_count" in name for name, _ in scrape(metrics_url)), 10)
    ours = {key: count for key, count in scrape(metrics_url).items() if key[0].startswith("clotline")}
    assert not any(ours.values()), "the proof of the server is no prediction"
    bags = [blotchy_tiles(size, seed) for seed, size in enumerate((1, 1, 2, 3, 5, 8, 9, 20, 70))]
    with SlideClient(served.http_url, model="slide_classifier") as client:
        answers = [client.classify_bag(bag) for bag in bags]
        with pytest.raises(RequestRefused):
            client.classify_bag((*bags[4], b"\xff\xd8 broken"))
    for bad, says in (
        ((b"x",) * 1025, "has 1025 tiles"),
        ((), "has 0 tiles"),
    ):  # our client would not send them
        with pytest.raises(triton.InferenceServerException, match=says):
            ask(address, bad)
    wait_until(lambda: value("rejected_inputs_total", ("reason", "empty_bag")) == 1, 10)
    time.sleep(1.5 * HISTOGRAMS_EVERY_S)  # each instance tells on its own
    assert value("bag_tiles_count") == len(bags) + 1
    assert value("rejected_inputs_total", ("reason", "too_many_tiles")) == 1
    assert value("rejected_inputs_total", ("reason", "broken_tile")) == 1
    assert value("rejected_inputs_total", ("reason", "empty_bag")) == 1
    assert value("rejected_inputs_total", ("reason", "too_many_bytes")) == 0
    labels = Counter(SPEC.class_names[answer.label_index] for answer in answers)
    for name in SPEC.class_names:
        assert value("predictions_total", ("class", name)) == labels[name]
        assert value("prediction_confidence_count", ("class", name)) == labels[name]
    abstained = sum(not answer.answered for answer in answers)
    assert 0 < abstained < len(answers), "these bags must tell the two apart"
    assert value("abstentions_total") == abstained
    sizes = [*map(len, bags), 6]
    assert value("bag_tiles_sum") == sum(sizes)
    for edge in BAG_EDGES:
        assert value("bag_tiles_bucket", ("le", str(edge))) == sum(size <= edge for size in sizes)
    found = scrape(metrics_url)
    broken = frozenset({("model", "tile_preprocess"), ("reason", "not_an_image")})
    assert found[("clotline_rejected_inputs_total", broken)] == 1
    confidences = [answer.probabilities_K[answer.label_index] for answer in answers]
    total = sum(value("prediction_confidence_sum", ("class", name)) for name in SPEC.class_names)
    assert total == pytest.approx(float(sum(confidences)), abs=1e-4)
