from __future__ import annotations

from typing import Any

import pytest

from demo.errors import DemoError
from demo.triton_metrics import ModelCounts, difference, parse, scrape, settled

TEXT = """\
# HELP nv_inference_request_success Number of successful inference requests, all batch sizes
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="tile_classifier",version="1"} 12
nv_inference_request_success{model="tile_preprocess",version="1"} 12
# HELP nv_inference_count Number of inferences performed (does not include cached requests)
# TYPE nv_inference_count counter
nv_inference_count{model="tile_classifier",version="1"} 96
# HELP nv_inference_exec_count Number of model executions performed (does not include cached requests)
# TYPE nv_inference_exec_count counter
nv_inference_exec_count{model="tile_classifier",version="1"} 24
# HELP nv_inference_request_failure Number of failed inference requests, all batch sizes
# TYPE nv_inference_request_failure counter
nv_inference_request_failure{model="tile_classifier",reason="OTHER",version="1"} 1
nv_inference_request_failure{model="tile_classifier",reason="BACKEND",version="1"} 2
# HELP nv_inference_request_duration_us Cumulative inference request duration in microseconds
# TYPE nv_inference_request_duration_us counter
nv_inference_request_duration_us{model="tile_classifier",version="1"} 60000
# HELP nv_cpu_utilization CPU utilization rate [0.0 - 1.0]
# TYPE nv_cpu_utilization gauge
nv_cpu_utilization 0.5
"""


def test_counters_are_read_by_model_and_version() -> None:
    counts = parse(TEXT)[("tile_classifier", "1")]
    assert counts == ModelCounts("tile_classifier", "1", 12, 3, 96, 24, 60000.0)
    assert counts.mean_request_ms == 5.0
    assert counts.mean_batch == 4.0
    assert set(parse(TEXT)) == {("tile_classifier", "1"), ("tile_preprocess", "1")}


def test_without_a_request_there_is_no_mean() -> None:
    nothing = ModelCounts("m", "1")
    assert (nothing.mean_request_ms, nothing.mean_batch, nothing.mean_queue_ms) == (None, None, None)


def test_only_what_was_asked_between_two_readings_counts() -> None:
    before = parse(TEXT)
    after = parse(
        TEXT.replace(
            '_success{model="tile_classifier",version="1"} 12',
            '_success{model="tile_classifier",version="1"} 20',
        )
    )
    after[("new", "2")] = ModelCounts("new", "2", requests=1)
    assert [(counts.model, counts.requests, counts.tiles) for counts in difference(before, after)] == [
        ("new", 1, 0),
        ("tile_classifier", 8, 0),
    ]


@pytest.mark.parametrize("url", ["file:///etc/hostname", "localhost:8002/metrics"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(DemoError, match="must start with http"):
        scrape(url)


def test_a_server_that_is_not_there_is_told(unused_tcp_port_number: int) -> None:
    with pytest.raises(DemoError, match="cannot read Triton's metrics from"):
        scrape(f"http://127.0.0.1:{unused_tcp_port_number}/metrics")


def test_a_real_server_counts_what_the_client_asks(served_repository: Any) -> None:
    import numpy as np

    from clients.slide_client import SlideClient
    from slides.decode import encode_tile

    tile = encode_tile(np.full((64, 64, 3), 120, np.uint8), 90)
    # The supervisor may ask a synthetic tile in between, which Triton counts like any other.
    for _ in range(5):
        before = settled(served_repository.metrics_url)
        with SlideClient(served_repository.http_url, batch=2) as client:
            client.classify([tile] * 6)
        after = settled(served_repository.metrics_url)
        changes = {counts.model: counts for counts in difference(before, after)}
        if changes["tile_preprocess"].requests == 3:
            break
    assert changes["tile_classifier"].requests == 3
    assert changes["tile_classifier"].failures == 0
    assert changes["tile_preprocess"].tiles == 6
    assert changes["tile_classifier"].mean_request_ms > 0
