"""Instances and batches by what a network's tiles take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from exporters.cpu_layout import FAST_MS, STATIC_BYTES, CpuLayout, cpu_layout, network_ms_of, preprocess_ms_of
from exporters.network_work import NetworkWork, network_work
from exporters.triton_config import CPU_DYNAMIC_BATCH
from slides.spec import ModelSpec
from training import network

SMALL_BYTES = 45_000_000


@pytest.mark.parametrize("network_ms", [None, FAST_MS, 18.0])
def test_a_network_that_takes_long_or_is_unknown_gets_every_core(network_ms: float | None) -> None:
    assert cpu_layout(4, network_ms, 1.2, SMALL_BYTES) == CpuLayout(
        4,
        CPU_DYNAMIC_BATCH,
        alone=True,
        static=True,
        gives_way=network_ms == FAST_MS,
        preprocess_instances=4 if network_ms is None else 1,
    )


def test_a_fast_network_gets_the_instances_that_it_keeps_busy_and_never_none_or_more_than_cores() -> None:
    assert cpu_layout(2, 1.4, 1.2, SMALL_BYTES).instances == 1
    assert cpu_layout(2, 2.4, 1.2, SMALL_BYTES).instances == 2
    for cores in (1, 2, 16):
        counts = [cpu_layout(cores, 0.1 * step, 1.2, SMALL_BYTES).instances for step in range(1, 40)]
        assert counts == sorted(counts)
        assert counts[0] >= 1
        assert counts[-1] <= cores
    assert cpu_layout(2, 1.4, 1.2, SMALL_BYTES).gathered > CPU_DYNAMIC_BATCH


@pytest.mark.parametrize("network_ms", [None, 18.0, 36.0])
def test_a_slow_network_keeps_a_lone_executions_threads_and_a_fast_one_does_not(
    network_ms: float | None,
) -> None:
    parameters = {"NUM_STREAMS": "1", "alone_thread_count": "0"}
    assert cpu_layout(2, network_ms, 1.2, SMALL_BYTES).parameters(parameters) == parameters
    assert cpu_layout(2, 1.4, 1.2, SMALL_BYTES).parameters(parameters) == {"NUM_STREAMS": "1"}


@pytest.mark.parametrize("network_ms", [None, 1.4, 18.0, 36.0])
def test_a_networks_bytes_decide_whether_its_batches_are_static(
    network_ms: float | None,
) -> None:
    parameters = {"static_batches": "YES"}
    assert cpu_layout(2, network_ms, 1.2, STATIC_BYTES).parameters(parameters) == parameters
    assert cpu_layout(2, network_ms, 1.2, STATIC_BYTES + 1).parameters(parameters) == {}


def test_a_network_gives_way_where_preprocessing_takes_a_tenth_of_the_time() -> None:
    parameters = {"niceness": "10"}
    assert cpu_layout(2, 18.0, 1.2, SMALL_BYTES).parameters(parameters) == {}
    assert cpu_layout(2, None, 1.2, SMALL_BYTES).parameters(parameters) == {}
    for network_ms in (1.4, 4.1):
        assert cpu_layout(2, network_ms, 1.2, SMALL_BYTES).parameters(parameters) == parameters


def test_preprocessing_gets_the_instances_that_it_keeps_busy() -> None:
    assert cpu_layout(1, 1.4, 1.2, SMALL_BYTES).preprocess_instances == 1
    assert cpu_layout(2, 18.0, 1.2, SMALL_BYTES).preprocess_instances == 1
    assert cpu_layout(8, 18.0, 1.2, SMALL_BYTES).preprocess_instances == 1
    assert cpu_layout(32, 18.0, 1.2, SMALL_BYTES).preprocess_instances == 2
    assert cpu_layout(16, 1.4, 1.2, SMALL_BYTES).preprocess_instances == 7
    assert cpu_layout(16, 1.4, 12.0, SMALL_BYTES).preprocess_instances > 12
    assert cpu_layout(16, None, 1.2, SMALL_BYTES).preprocess_instances == 16


def spec_of(side_px: int) -> ModelSpec:
    return ModelSpec(class_names=("CE", "LAA"), tile_size_px=side_px, um_per_px=0.5, input_size_px=224,
                     tiles_per_slide=4, min_tissue_share=0.5)  # fmt: skip


def test_a_larger_tile_takes_longer_to_decode() -> None:
    assert preprocess_ms_of(spec_of(1024)) == 4 * preprocess_ms_of(spec_of(512))


def test_work_is_counted() -> None:
    backbone = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)
    )
    assert network_work(backbone, 8) == NetworkWork(5 * 3 * 3 * 3 * 8 * 8 + 5 * 2, 2)


@pytest.mark.parametrize(
    ("architecture", "precision", "instances", "gathered", "alone", "gives_way"),
    [
        ("resnet18", "fp32", 2, CPU_DYNAMIC_BATCH, True, False),
        ("resnet18", "int8", 2, 4, False, True),
        ("mobilenet_v3_small", "int8", 1, 4, False, True),
        ("efficientnet_lite0", "fp32", 2, 4, False, True),
    ],
)
def test_known_networks_on_two_cores(
    architecture: str, precision: str, instances: int, gathered: int, alone: bool, gives_way: bool
) -> None:
    """As measured to be best, docs/performance.md; nothing is measured here, so it cannot be otherwise another time."""
    torch.manual_seed(0)
    spec = spec_of(512)
    work = network_work(network.build(architecture, spec).backbone.eval(), spec.input_size_px)
    layout = cpu_layout(2, network_ms_of(work, precision), preprocess_ms_of(spec), SMALL_BYTES)
    assert layout == CpuLayout(
        instances, gathered, alone=alone, static=True, gives_way=gives_way, preprocess_instances=1
    )
