"""The moving average: the same numbers as torch's own, for one operation a step."""

import pytest
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

import cup
from train.network.ema import MovingAverage


class Operations(TorchDispatchMode):
    """Counts what would be a kernel launch or a read by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "detach" not in function.name():  # a view
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))


def step(model: nn.Module, number: int) -> None:
    """Other weights and running statistics."""
    torch.manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
        model(torch.randn(2, 3, 8, 8))


def test_it_is_torch_s_own_average_but_for_counters():
    model = network()
    ours = MovingAverage(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for number in range(5):
        step(model, number)
        ours.update_parameters(model)
        theirs.update_parameters(model)
    found, expected = ours.state_dict(), theirs.state_dict()
    assert list(found) == list(expected)
    counters = {"module.1.num_batches_tracked"}
    assert all(torch.equal(found[key], expected[key]) for key in set(found) - counters)
    assert found["module.1.num_batches_tracked"] == 1  # of the first update
    ours.copy_counters(model)
    assert ours.module[1].num_batches_tracked == 5


def test_it_goes_on_from_its_state():
    model = network()
    whole, first = MovingAverage(model, 0.9), MovingAverage(model, 0.9)
    for number in range(4):
        step(model, number)
        whole.update_parameters(model)
        if number < 2:
            first.update_parameters(model)
        else:
            if number == 2:
                second = MovingAverage(network(), 0.9)
                second.load_state_dict(first.state_dict())
            second.update_parameters(model)
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in whole.state_dict().items())


def test_it_follows_the_model_through_a_resize():
    model = network()
    average = MovingAverage(model, 0.5)
    step(model, 0)
    average.update_parameters(model)
    resized = cup.apply_plan(
        model, cup.PrunePlan({"0": (1, 4)}, {"0": 6}), cup.channel_groups(model, torch.zeros(1, 3, 8, 8))
    )
    cup.carry_ema(average, resized)
    average.begin()
    before = average.module[0].weight.clone()
    step(model, 1)
    average.update_parameters(model)
    torch.testing.assert_close(average.module[0].weight, (before + model[0].weight) / 2)


@pytest.mark.parametrize("updates", [1, 2])
def test_an_update_takes_few_operations_and_no_read_by_the_host(updates: int):
    model = torchvision.models.resnet50()
    average = MovingAverage(model, 0.9)
    for _ in range(updates):
        average.update_parameters(model)
    with Operations() as seen:
        average.update_parameters(model)
    assert len(seen.names) <= 10
    assert not [name for name in seen.names if "item" in name or "local_scalar" in name]
