"""Losses and gradients that are not finite: the step is left out, or the run ends, and nothing of it is saved."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import events, train
from torch import nn

from train.checkpoint.file import load_checkpoint
from train.errors import TrainError
from train.loop import engine
from train.loop.nonfinite import StepGuard
from train.network.optim import OptimConfig, build_optimizer
from train.network.precision import Precision
from train.network.state import TrainState

SKIP = {"train__nonfinite": "skip", "prune__method": "none", "train__epochs": 2}


class Normed(nn.Module):
    """A small network with running statistics, which a batch of NaN would spoil for good."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 8, 5, stride=4), nn.BatchNorm2d(8), nn.Linear(8 * 36, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.conv(images)).relu().flatten(1))


@pytest.fixture(autouse=True)
def normed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.build.build_model", lambda *_: Normed())
    monkeypatch.setattr("train.loop.watch.MAX_STEPS", 1)  # look after every step


def in_place_of_steps(monkeypatch: pytest.MonkeyPatch, steps: set[int], action: Callable) -> None:
    """Call `action(honest, state, images, ...)` for these training steps (1, 2, ...)."""
    honest, taken = engine.training_step, []

    def step(*arguments: object) -> torch.Tensor:
        taken.append(1)
        return action(honest, *arguments) if len(taken) in steps else honest(*arguments)

    monkeypatch.setattr(engine, "training_step", step)


def with_nan(honest: Callable, state: TrainState, images: torch.Tensor, *others: object) -> torch.Tensor:
    return honest(state, images.index_fill(0, torch.tensor([3]), float("nan")), *others)


def left_out(honest: Callable, *arguments: object) -> torch.Tensor:
    return torch.zeros(())


@pytest.mark.parametrize(("precision", "clip_norm"), [("fp32", 0.0), ("bf16", 0.5)])
def test_a_step_that_is_not_finite_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, clip_norm: float
):
    """Bit for bit what comes of a run that never made the step: weights, momentum, running statistics."""
    log = {}
    for name, action in (("nan", with_nan), ("without", left_out)):
        with monkeypatch.context() as patch:
            in_place_of_steps(patch, {3}, action)
            log[name] = train(tmp_path / name, **SKIP, train__precision=precision, train__clip_norm=clip_norm)
    assert [event["skipped_steps"] for event in events(log["nan"], "epoch")] == [1, 0]
    one, other = (load_checkpoint(tmp_path / name / "tiny/last.pt") for name in log)
    counter = "norm.num_batches_tracked"  # counts forward passes; no batch norm with a fixed momentum reads it
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"] if key != counter)
    momenta = [[s["momentum_buffer"] for s in content["optimizer"]["state"].values()] for content in (one, other)]
    assert all(map(torch.equal, *momenta))
    losses = [event["train_loss"] for event in events(log["nan"], "epoch")]
    assert losses[0] == pytest.approx(events(log["without"], "epoch")[0]["train_loss"] * 4 / 3)  # the mean of 3 steps
    assert losses[1] == events(log["without"], "epoch")[1]["train_loss"]


def test_the_moving_average_stays_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    in_place_of_steps(monkeypatch, {1, 3}, with_nan)
    train(tmp_path, **SKIP, train__ema_decay=0.9)
    ema = load_checkpoint(tmp_path / "tiny/last.pt")["ema"]
    assert all(torch.isfinite(value).all() for value in ema.values())


def test_so_many_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    in_place_of_steps(monkeypatch, {2, 4, 5, 6}, with_nan)  # not the two before and after step 3
    with pytest.raises(TrainError, match=r"3 steps in a row were not finite in epoch 2, at or before step 2"):
        train(tmp_path, **SKIP, train__nonfinite_limit=3)
    assert (tmp_path / "tiny/last.pt").exists()


def test_an_epoch_of_nothing_but_steps_left_out_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    in_place_of_steps(monkeypatch, {5, 6, 7, 8}, with_nan)
    with pytest.raises(TrainError, match=r"all 4 steps of epoch 2 were left out.*look at the data"):
        train(tmp_path, **SKIP)


def test_fp16_leaves_steps_out_by_its_scaler_and_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    in_place_of_steps(monkeypatch, {3}, with_nan)
    log = train(tmp_path, **SKIP, train__precision="fp16")
    assert events(log, "epoch")[0]["skipped_steps"] >= 1
    stored = load_checkpoint(tmp_path / "tiny/last.pt")
    assert all(torch.isfinite(value).all() for value in stored["model"].values())


def test_by_default_the_run_ends_at_the_next_look_and_not_after_the_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    in_place_of_steps(monkeypatch, {6}, with_nan)
    with pytest.raises(TrainError, match=r"the loss is not finite in epoch 2, at or before step 2: lower optim\.lr"):
        train(tmp_path, prune__method="none", run__save_every_minutes=1e-9)
    stored = load_checkpoint(tmp_path / "tiny/last.pt")
    assert stored["ranks"][0]["so_far"]["step"] == 1  # the step before
    assert all(torch.isfinite(value).all() for value in stored["model"].values())
    log = train(tmp_path, prune__method="none", train__nonfinite="skip")  # as the error says
    assert (events(log, "run")[-1]["first_step"], log[-1]["event"]) == (1, "done")


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As after gradients that overflow while the loss is still a number."""

    def spoil(honest: Callable, state: TrainState, *others: object) -> torch.Tensor:
        loss = honest(state, *others)
        state.model.fc.weight.data[0, 0] = float("inf")
        return loss

    in_place_of_steps(monkeypatch, {4}, spoil)
    with pytest.raises(TrainError, match=r"the weights are not finite after step 4"):
        train(tmp_path, prune__method="none", run__save_every_minutes=1e-9)
    assert load_checkpoint(tmp_path / "tiny/last.pt")["ranks"][0]["so_far"]["step"] == 3


def test_an_optimizer_that_cannot_be_told_is_not_called():
    model = Normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # neither fused nor, as here, apex's
    state = TrainState(model, model, optimizer, Precision("fp32", torch.device("cpu")))
    guard = StepGuard(torch.device("cpu"))
    guard.begin(state)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for value, moves in ((float("nan"), False), (1.0, True)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        guard.step(state, clip_norm=0.0)
        changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert changed == [moves] * len(before)
        assert guard.longest == 1 and guard.found_inf == (not moves)


@pytest.mark.parametrize(("value", "found_inf"), [(float("nan"), 1), (float("inf"), 1), (1e30, 0)])
def test_clipping_by_a_norm_that_is_not_finite_spoils_no_weight(value: float, found_inf: int):
    """The squares of 1e30 overflow: the norm is infinite though the gradients are not, and they are clipped to 0."""
    model = nn.Linear(4, 4)
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0))
    state = TrainState(model, model, optimizer, Precision("fp32", torch.device("cpu")))
    guard = StepGuard(torch.device("cpu"))
    guard.begin(state)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
        parameter.grad.view(-1)[0] = value
    guard.step(state, clip_norm=1.0)
    assert guard.found_inf == found_inf
    assert all(map(torch.equal, before, model.parameters()))
    assert not any(optimizer.state[parameter]["momentum_buffer"].any() for parameter in model.parameters())
