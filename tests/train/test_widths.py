"""`round_to: measured`: which widths come out of given times, what is timed, and that a run sticks to its table."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from launching import events, train
from torch import nn

import cup
from train import build
from train.methods import HardRamp
from train.network import widths
from train.network.models import build_model
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT
from train.network.widths import measured_widths, right_edges, two_fastest, widths_to_time

CPU = torch.device("cpu")


def staircase(tile):
    """Hardware that works in tiles of so many channels: seconds at every width up to 64."""
    return {width: 1.0 + -(-width // tile) for width in range(8, 65, 8)}


@pytest.mark.parametrize(("tile", "edges"), [(8, [*range(8, 65, 8)]), (16, [16, 32, 48, 64]), (64, [64])])
def test_the_right_edges_of_a_staircase_are_allowed(tile, edges):
    assert right_edges(staircase(tile)) == edges


def test_a_width_that_is_slower_than_a_wider_one_is_not_allowed():
    assert right_edges({8: 1.0, 16: 3.0, 24: 2.0, 32: 4.0}) == [8, 24, 32]


def test_times_within_the_noise_count_as_equal():
    assert right_edges({8: 0.99, 16: 1.0}) == [16]
    assert right_edges({8: 0.97, 16: 1.0}) == [8, 16]


def test_steps_each_within_the_noise_do_not_add_up_to_a_long_way():
    """At 1.5% a step nobody is sent to the widest for the narrowest: what is compared is the width that is taken."""
    edges = right_edges({width: 1.015**width for width in range(1, 101)})
    assert len(edges) == 50
    assert all(wide - narrow == 2 for narrow, wide in itertools.pairwise(edges))


@pytest.mark.parametrize(
    ("width", "found"),
    [(5, [5]), (8, [8]), (20, [8, 16, 20]), (64, [*range(8, 65, 8)]), (500, [*range(64, 500, 64), 500])],
)
def test_the_widths_that_are_timed_are_few_multiples_of_8_and_the_width_there_is(width, found):
    assert widths_to_time(width) == found


class Mixed(nn.Module):
    """A stem that was cut already, a depthwise and a grouped convolution, a flatten before a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.point = nn.Conv2d(24, 16, 1)
        self.head = nn.Linear(16 * 4 * 4, 5)

    def forward(self, images):
        images = torch.relu(self.point(self.depthwise(self.stem(images))))
        return self.head(torch.flatten(nn.functional.max_pool2d(images, 2), 1))


def test_each_group_is_timed_with_all_its_layers_at_the_shapes_of_their_calls(monkeypatch):
    """Against what the network itself calls once it is cut to these widths: the same layers and inputs."""
    model = Mixed()
    groups = cup.channel_groups(model, torch.empty(1, 3, 8, 8))
    timed = []
    monkeypatch.setattr(
        widths._Timer, "_measured", lambda self, layer, shape: timed.append((repr(layer), shape)) or (1.0, 1.0)
    )
    measured_widths(model, cup.prunable_groups(groups), 2, Precision("fp32", CPU), CPU)

    for group in cup.prunable_groups(groups):
        for width in widths_to_time(group.width):
            twin = Mixed()
            cup.shrink_to(twin, {group.name: width}, torch.empty(1, 3, 8, 8))
            seen: list[tuple] = []

            def note(layer, inputs, output, seen=seen):
                seen.append((repr(layer), tuple(inputs[0].shape)))

            for place in group.places:
                twin.get_submodule(place.module).register_forward_hook(note)
            twin(torch.randn(1, 3, 8, 8))
            assert len(seen) == len({place.module for place in group.places})
            assert set(seen) <= set(timed)
    assert len(timed) == len(set(timed)), "equal layers are timed once"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layers_are_really_timed_and_neither_model_nor_random_numbers_change(precision):
    model = Mixed().to(memory_format=MEMORY_FORMAT)
    before, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    groups = cup.prunable_groups(cup.channel_groups(model, torch.empty(1, 3, 8, 8)))
    table, _ = measured_widths(model, groups, 4, Precision(precision, CPU), CPU)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert json.loads(json.dumps(table)) == table
    for group in groups:
        assert set(table[group.name]) <= set(widths_to_time(group.width))
        assert table[group.name][-1] == group.width


@pytest.mark.parametrize(("batch_size", "timed"), [(4, 4), (64, 16)])
def test_what_is_timed_goes_forward_and_backward_with_the_batch_of_a_step(monkeypatch, batch_size, timed):
    """A CPU is given 16 images at most."""
    gradients, steps, backward = [], [], torch.Tensor.backward
    monkeypatch.setattr(widths, "two_fastest", lambda work, device: steps.append(1) or work() or (1.0, 1.0))
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda self, gradient: gradients.append(self.shape) or backward(self, gradient)
    )
    groups = cup.channel_groups(Mixed(), torch.empty(1, 3, 8, 8))
    measured_widths(Mixed(), cup.prunable_groups(groups), batch_size, Precision("fp32", CPU), CPU)
    assert len(gradients) == len(steps) > 5
    assert {shape[0] for shape in gradients} == {timed}


def test_the_fastest_calls_count_and_the_first_one_does_not(monkeypatch):
    now, seconds = [0.0], iter([0.5, 5.0, 4.0, 3.0, 6.0, 7.0, 1.0])
    monkeypatch.setattr(widths.time, "perf_counter", lambda: now[0])
    assert two_fastest(lambda: now.append(now.pop() + next(seconds)), CPU) == (3.0, 4.0)
    assert next(seconds) == 1.0, "a warm-up and five calls"


def test_groups_whose_times_do_not_repeat_are_named(monkeypatch):
    """At one width of all it may happen; at conv2 it is so at every one."""
    model = build_model("lenet", 10)
    groups = cup.prunable_groups(cup.channel_groups(model, torch.empty(1, 1, 28, 28)))

    def seconds(self, model, group, width):
        return width / 10, width / 10 * (1.05 if group.name == "conv2" or width == group.width else 1.01)

    monkeypatch.setattr(widths._Timer, "seconds", seconds)
    table, scattered = measured_widths(model, groups, 2, Precision("fp32", CPU), CPU)
    assert scattered == ["conv2"]
    assert table["conv1"] == [8, 16, 20]


def numbers(log):
    return [[event[key] for key in ("epoch", "train_loss", "top1", "widths")] for event in events(log, "epoch")]


TABLE = {"conv1": [3, 7, 20], "conv2": [11, 23, 31, 50], "fc1": [70, 330, 415, 500]}


def test_a_run_plans_with_what_was_measured_and_a_resumed_one_does_not_measure_again(tmp_path: Path, monkeypatch):
    """Else a resume on a machine in another mood would go on to other widths than the undisturbed run."""
    measured = []
    monkeypatch.setattr(build, "measured_widths", lambda *args: measured.append(args) or (TABLE, []))
    settings = {"prune__round_to": "measured", "train__epochs": 4, "prune__last_epoch": 4}
    log = train(tmp_path, **settings)
    assert [batch_size for _, _, batch_size, *_ in measured] == [32]
    cuts = [event["widths"] for event in events(log, "epoch")][1:]
    assert cuts[0] != cuts[-1]
    for cut in cuts:
        assert all(width in TABLE[name] for name, width in cut.items())

    class Killed(Exception):
        pass

    def kill(self, epoch, view):
        if epoch == 3:
            raise Killed
        return epoch_start(self, epoch, view)

    other, epoch_start = tmp_path / "other", HardRamp.epoch_start
    monkeypatch.setattr(HardRamp, "epoch_start", kill)
    with pytest.raises(Killed):
        train(other, **settings)
    monkeypatch.setattr(HardRamp, "epoch_start", epoch_start)
    monkeypatch.setattr(build, "measured_widths", lambda *args: pytest.fail("measured a second time"))
    again = train(other, **settings)
    assert numbers(again) == numbers(log)


def test_layers_that_no_width_is_worth_cutting_and_those_badly_timed_are_noted(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(build, "measured_widths", lambda *args: (TABLE | {"fc1": [500]}, ["conv1", "conv2"]))
    log = train(tmp_path, prune__round_to="measured", train__epochs=1, prune__last_epoch=1)
    _, uncut, unsure = [event["message"] for event in events(log, "note") if "measured" in event["message"]]
    assert "1 of 3 layers stay as wide as they are" in uncut and "here: fc1; a number" in uncut
    assert "unsure of 2 of 3 layers, whose times do not repeat within 2%" in unsure and unsure.endswith("conv1, conv2")


def test_a_dense_run_measures_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(build, "measured_widths", lambda *args: pytest.fail("measured"))
    train(tmp_path, prune__round_to="measured", prune__method="none", train__epochs=1, prune__last_epoch=1)
