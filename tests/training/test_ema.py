"""training/ema.py"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from training.ema import WeightAverage
from training.errors import CheckpointError


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).to(dtype)


def walk(model: nn.Module, steps: int, average: WeightAverage | None = None) -> list[dict[str, torch.Tensor]]:
    """Train a little; the state after every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states = []
    for step in range(steps):
        inputs = torch.randn(
            16, 4, generator=torch.Generator().manual_seed(step), dtype=next(model.parameters()).dtype
        )
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        if average is not None:
            average.update()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


def test_average_is_the_formula_with_lower_decay_at_first() -> None:
    model = small()
    expected = {name: value.double() for name, value in model.state_dict().items()}
    average = WeightAverage(model, decay=0.5)
    for n, state in enumerate(walk(model, 12, average), start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        for name, value in state.items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    tensors = average.state_dict()["tensors"]
    assert tensors.keys() == model.state_dict().keys()
    for name in tensors:
        if name.endswith("num_batches_tracked"):
            assert torch.equal(tensors[name], model.state_dict()[name])
        else:
            torch.testing.assert_close(tensors[name].double(), expected[name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(tensors["1.running_mean"], model.state_dict()["1.running_mean"])


def test_in_place_lends_the_average_and_gives_the_weights_back() -> None:
    model = small()
    average = WeightAverage(model, decay=0.9)
    walk(model, 5, average)
    before = copy.deepcopy(model.state_dict())
    with average.in_place():
        inside = copy.deepcopy(model.state_dict())
    assert all(torch.equal(inside[name], value) for name, value in average.state_dict()["tensors"].items())
    assert not torch.equal(inside["0.weight"], before["0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ZeroDivisionError), average.in_place():
        raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_going_on_from_a_state_gives_the_same_bits() -> None:
    straight = small()
    average = WeightAverage(straight, decay=0.9)
    walk(straight, 3, average)
    resumed = copy.deepcopy(straight)
    state = copy.deepcopy(average.state_dict())
    walk(straight, 4, average)
    again = WeightAverage(resumed, decay=0.9)
    again.load_state_dict(state)
    walk(resumed, 4, again)
    assert again.updates == average.updates == 7
    for name, value in average.state_dict()["tensors"].items():
        assert torch.equal(value, again.state_dict()["tensors"][name])


def test_half_precision_weights_are_averaged_in_fp32() -> None:
    model = small(torch.bfloat16)
    average = WeightAverage(model, decay=0.999)
    first = average.state_dict()["tensors"]["0.weight"].clone()
    average.updates = 100_000  # past the lower decays
    with torch.no_grad():
        model[0].weight.add_(1.0)  # type: ignore[operator]
    average.update()
    moved = average.state_dict()["tensors"]["0.weight"]
    assert moved.dtype == torch.float32
    # In bfloat16 a step of a thousandth would be lost.
    torch.testing.assert_close(moved - first, torch.full_like(first, 0.001), rtol=1e-2, atol=1e-5)
    with average.in_place():
        assert model[0].weight.dtype == torch.bfloat16


def test_frozen_parameters_are_not_kept_twice() -> None:
    model = small()
    model[0].requires_grad_(False)
    kept = WeightAverage(model, decay=0.9).state_dict()["tensors"]
    assert not any(name.startswith("0.") for name in kept)
    assert "2.weight" in kept


def test_constant_buffers_stay_as_they_are() -> None:
    model = small()
    model.register_buffer("mean", torch.tensor([0.485, 0.1, 1 / 3]) * 255)
    average = WeightAverage(model, decay=0.9)
    walk(model, 20, average)
    assert torch.equal(average.state_dict()["tensors"]["mean"], model.get_buffer("mean"))


@pytest.fixture
def process_group() -> Iterator[None]:
    """This process alone, as a group that can shard weights."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_sharded_weights_are_averaged_and_lent_alike() -> None:
    plain, sharded = small(), small()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(sharded, mesh=mesh)
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(9))
    answers = []
    for model in (plain, sharded):
        average = WeightAverage(model, decay=0.9)
        walk(model, 3, average)
        model.eval()
        with torch.no_grad():
            own = model(inputs)
            with average.in_place():
                lent = model(inputs)
        walk(model.train(), 2, average)  # with its own weights, not with those gathered for the last answer
        kept = average.state_dict()["tensors"]
        assert all(type(value) is torch.Tensor for value in kept.values())
        answers.append((own, lent, *kept.values()))
    assert not torch.equal(answers[0][0], answers[0][1])
    for value, of_shards in zip(*answers, strict=True):
        torch.testing.assert_close(of_shards, value)


def test_state_of_another_network_is_refused() -> None:
    average = WeightAverage(small(), decay=0.9)
    other = WeightAverage(nn.Linear(4, 2), decay=0.9).state_dict()
    with pytest.raises(CheckpointError, match="another network: 11 tensors do not fit"):
        average.load_state_dict(other)
