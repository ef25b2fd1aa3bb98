"""The seam for methods: a toy of a criterion and of a method, defined here, goes through a whole run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import events, interrupted, numbers, train, train_undisturbed
from torch import Tensor, nn

import cup
from cup import CRITERIA, ChannelGroup, Ranking, View
from launch.reports.read import read_run
from train.checkpoint.file import load_checkpoint
from train.checkpoint.network import stored_plans
from train.loop.config import TrainConfig
from train.loop.step import training_step
from train.methods import METHODS, Action, Method
from train.network.models import build_model
from train.network.optim import OptimConfig, build_optimizer
from train.network.precision import Precision
from train.network.state import TrainState

CPU = torch.device("cpu")


class LastFirst:
    """A criterion: the last channel goes first."""

    def rank(self, group: ChannelGroup, view: View, masks: cup.tracing.groups.Masks) -> Ranking:
        return Ranking(np.arange(group.width)[::-1].copy(), np.arange(1.0, group.width))


class SoftThenHard(Method):
    """Zeroes half of conv2's filters after each epoch, removes them after the last but one."""

    label = "toy"

    def __init__(self, epochs: int, criterion: str) -> None:
        self._epochs, self._options = epochs, cup.PlanOptions(criterion=criterion)
        self.acted_on: list[bool] = []
        self.steps = 0

    def epoch_end(self, epoch: int, view: View) -> Action | None:
        if epoch >= self._epochs:
            return None
        width = next(group.width for group in view.groups if group.name == "conv2")
        plan = cup.plan_by_counts(view.model, view.groups, {"conv2": width // 2}, self._options)
        return Action(plan, soft=epoch < self._epochs - 1)

    def after_action(self, action: Action, view: View) -> None:
        self.acted_on.append(action.soft)

    def after_backward(self, model: nn.Module) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"acted_on": self.acted_on, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.acted_on, self.steps = state.get("acted_on", []), state.get("steps", 0)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CRITERIA, "last_first", LastFirst())
    monkeypatch.setitem(METHODS, "toy", lambda config, epochs, measured: SoftThenHard(epochs, config.criterion))


class KeepsAll(SoftThenHard):
    """Asks for a cut that removes nothing."""

    def epoch_end(self, epoch: int, view: View) -> Action | None:
        return Action(cup.plan_by_counts(view.model, view.groups, {}))


def test_a_cut_that_removes_nothing_is_a_note_and_no_action(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS, "toy", lambda config, epochs, measured: KeepsAll(epochs, "cup"))
    log = train(tmp_path, prune__method="toy", train__epochs=1, prune__last_epoch=1)
    assert not events(log, "resize")
    assert "epoch 1: a cut removes nothing" in [event["message"] for event in events(log, "note")]
    assert load_checkpoint(tmp_path / "tiny/last.pt")["method"]["state"]["acted_on"] == []


SETTINGS = {"prune__method": "toy", "prune__criterion": "last_first", "train__epochs": 4, "prune__last_epoch": 4}


def test_a_method_and_a_criterion_from_outside_act_at_the_ends_of_epochs(tmp_path: Path, toys: None):
    log = train(tmp_path, **SETTINGS, train__ema_decay=0.5)
    zeroed, resized = events(log, "zero"), events(log, "resize")
    assert [(event["epoch"], event["removed"]) for event in zeroed] == [(1, {"conv2": 25}), (2, {"conv2": 25})]
    assert [(event["epoch"], event["removed"]) for event in resized] == [(3, {"conv2": 25})]
    assert [event["widths"]["conv2"] for event in events(log, "epoch")] == [50, 50, 25, 25]
    assert zeroed[0]["flops_reduction_after"] == 1.0 < resized[0]["flops_reduction_after"]
    assert events(log, "run")[0]["method"] == "toy"
    assert read_run(tmp_path / "tiny").method == "toy"
    stored = load_checkpoint(tmp_path / "tiny/last.pt")
    assert stored["method"] == {"name": "toy", "state": {"acted_on": [True, True, False], "steps": 16}}
    [plan] = stored_plans(stored)
    assert plan.kept["conv2"] == tuple(range(25)), "what the toy criterion keeps"


@pytest.mark.parametrize("at_step", [3, 6, 11, 14], ids=["soft", "zeroed once", "about to be cut", "cut"])
def test_a_run_goes_on_in_the_middle_of_a_method(
    tmp_path: Path, toys: None, monkeypatch: pytest.MonkeyPatch, at_step: int
):
    settings = SETTINGS | {"run__save_every_minutes": 1e-9}
    monkeypatch.setattr("train.loop.watch.MAX_STEPS", 1)
    undisturbed = train_undisturbed(tmp_path / "a", **settings)
    again = interrupted(tmp_path / "b", monkeypatch, at_step, **settings)
    assert numbers(again) == numbers(undisturbed)
    one, other = (load_checkpoint(tmp_path / side / "tiny/last.pt") for side in "ab")
    assert one["method"] == other["method"]
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])


def test_zeroed_filters_may_grow_back():
    torch.manual_seed(0)
    model = build_model("lenet", 10)
    groups = cup.channel_groups(model, torch.zeros(1, 1, 28, 28))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cup.zero_filters(model, cup.PrunePlan({"conv1": (0, 3)}, {"conv1": 20}), groups)
    gone = [channel for channel in range(20) if channel not in (0, 3)]
    for name, value in model.state_dict().items():
        if name == "conv1.weight":
            assert not value[gone].any() and torch.equal(value[[0, 3]], before[name][[0, 3]])
        else:
            assert torch.equal(value, before[name])
    model(torch.randn(2, 1, 28, 28)).square().sum().backward()
    assert model.conv1.weight.grad[gone].any()
    with pytest.raises(cup.CupError, match="another network's"):
        cup.zero_filters(model, cup.PrunePlan({"conv9": (0,)}, {"conv9": 2}), groups)


class Shrink(Method):
    """A penalty on the squares of the weights, and gradients that are halved."""

    def penalty(self, model: nn.Module) -> Tensor:
        return sum(0.5 * 0.1 * parameter.square().sum() for parameter in model.parameters())

    def after_backward(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad *= 0.5


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_penalty_counts_once_a_step_and_gradients_are_changed_before_they_are_clipped(accumulate: int):
    """The plain formula: w - lr * clip(0.5 * (gradient of the loss + 0.1 w))."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    state = TrainState(
        model, model, build_optimizer(model, OptimConfig(lr=0.5, momentum=0, weight_decay=0)), Precision("fp32", CPU)
    )
    images, labels = torch.randn(6, 3, 2, 2, dtype=torch.float64), torch.arange(6) % 3
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    loss = nn.functional.cross_entropy(model(images), labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = [0.5 * (gradient + 0.1 * weight) for gradient, weight in zip(gradients, weights, strict=True)]
    norm = torch.cat([part.flatten() for part in expected]).norm()
    config = TrainConfig(accumulate=accumulate, clip_norm=float(norm) / 2)
    logged = training_step(state, images, labels, config, method=Shrink())
    assert logged == pytest.approx(loss.item()), "the loss is logged without the penalty"
    for parameter, weight, part in zip(model.parameters(), weights, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), weight - 0.5 * part / 2, atol=1e-6, rtol=1e-5)


def test_the_console_tells_of_cuts_without_a_threshold_and_of_zeroed_filters(
    tmp_path: Path, toys: None, capsys: pytest.CaptureFixture
):
    train(tmp_path, **SETTINGS)
    said = capsys.readouterr().out
    assert "zeroed at the end of epoch 1: 25 channels, shapes stay" in said
    assert "resize at the end of epoch 3: 25 channels removed, FR 1.00 ->" in said
    assert "epoch   4/4" in said and "cannot be written" not in said


def test_a_method_whose_state_could_not_be_read_again_fails_at_the_first_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(METHODS, "toy", lambda config, epochs, measured: SoftThenHard(epochs, "cup"))
    monkeypatch.setattr(SoftThenHard, "state_dict", lambda self: {"mean": [np.float64(0.5)]})
    with pytest.raises(TypeError, match=r"SoftThenHard.state_dict\(\) must hold plain data and CPU tensors alone"):
        train(tmp_path, prune__method="toy", train__epochs=1, prune__last_epoch=1)


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({}, "CUP-SS"),
        ({"prune__momentum": "reset"}, "CUP-SS (momentum reset)"),
        ({"prune__momentum": "reset", "prune__fold": "true"}, "CUP-SS (momentum reset, folded)"),
        ({"prune__criterion": "l1"}, "l1, hard ramp"),
        ({"prune__method": "none"}, "dense"),
    ],
)
def test_the_log_says_which_method_it_was(tmp_path: Path, settings: dict[str, str], label: str):
    log = train(tmp_path, train__epochs=1, prune__last_epoch=1, **settings)
    assert events(log, "run")[0]["method"] == label
