"""Between two looks the host reads no value of the device, which would make both wait; and what a look reads is old."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ALONE, events, train
from torch import nn

from data import DataConfig, build_loaders
from launch.checkup.counting import Operations
from train.errors import TrainError
from train.log.ledger import Ledger
from train.loop import engine, readback
from train.loop.config import TrainConfig
from train.loop.mixing import build_mixing
from train.loop.nonfinite import StepGuard
from train.loop.progress import EpochSoFar
from train.loop.readback import Readback
from train.loop.trainer import TrainLoop
from train.methods import Dense
from train.network.counters import counted_together
from train.network.ema import MovingAverage
from train.network.models import build_model
from train.network.optim import OptimConfig, build_optimizer
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT, TrainState


def resnet50_loop(precision: str, clip_norm: float) -> TrainLoop:
    torch.manual_seed(0)
    model = build_model("resnet50", 10).to(memory_format=MEMORY_FORMAT)
    average = MovingAverage(model, 0.99)
    optimizer = build_optimizer(model, OptimConfig(lr=0.01))
    data = DataConfig(loader="synthetic", batch_size=4, image_size=32, resize_size=32, synthetic_images=16)
    [loader] = build_loaders(data, rank=0, world_size=1, device=ALONE.device, seed=0, splits=("train",))
    return TrainLoop(
        config=TrainConfig(accumulate=2, nonfinite="skip", clip_norm=clip_norm),
        optim=OptimConfig(lr=0.01),
        world=ALONE,
        loader=loader,
        mix=build_mixing(0.0, 0.0, 10),
        state=TrainState(model, model, optimizer, Precision(precision, ALONE.device), average),
        method=Dense(),
        ledger=Ledger(),
        guard=StepGuard(ALONE.device),
    )


@pytest.mark.parametrize(("precision", "clip_norm"), [("fp32", 0.0), ("fp16", 1.0)])
def test_the_steps_of_a_resnet50_read_nothing_from_the_device(precision: str, clip_norm: float):
    """With moving average, guard and accumulation; the first of the four steps sets up what the others use."""
    loop = resnet50_loop(precision, clip_norm)
    so_far = EpochSoFar.beginning(loop.ledger, ALONE.device)
    counts = []
    with Operations() as seen:

        def after_step() -> None:
            counts.append((seen.names.count("add_"), list(seen.reads)))
            seen.names.clear()

        engine.train_epoch(loop, 1, so_far, after_step=after_step)
    assert [reads for _, reads in counts[1:]] == [[], [], []]
    # Gradients of the second piece and residual sums of both: no batch norm counts for itself.
    assert max(additions for additions, _ in counts[1:]) < 161 + 2 * 16 + 53
    with Operations() as of_ema:
        loop.state.ema.update_parameters(loop.state.model)
    assert len(of_ema.names) <= 10


def test_norms_that_may_need_their_counter_keep_it():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.SyncBatchNorm(2), nn.BatchNorm2d(2, momentum=None))
    with counted_together(model, 1):
        assert [norm.num_batches_tracked is None for norm in model] == [True, False, False]
    assert [int(norm.num_batches_tracked) for norm in model] == [1, 0, 0]


def test_batch_norms_count_as_ever_in_one_operation():
    """All but one whose statistics depend on the count, and one that is frozen."""
    layers = [nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3), nn.BatchNorm2d(3)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(3, track_running_stats=False))
    model[2].eval()
    twin, images = copy.deepcopy(model), torch.randn(8, 3, 4, 4)
    counters = [layer.num_batches_tracked for layer in layers]
    with Operations() as seen, counted_together(model, 2):
        for _ in range(2):
            model(images)
    for _ in range(2):
        twin(images)
    assert [name for name in seen.names if "add_" in name] == ["add_", "add_", "_foreach_add_"]
    assert [layer.num_batches_tracked for layer in layers] == [2, 2, 0, 2]
    assert all(layer.num_batches_tracked is counter for layer, counter in zip(layers, counters, strict=True))
    assert list(model.state_dict()) == list(twin.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(model.buffers(), twin.buffers(), strict=True))
    with pytest.raises(ValueError, match="expected 4D input"), counted_together(model, 1):
        model(images[0])
    assert layers[0].num_batches_tracked is counters[0] and counters[0] == 2


class Event:
    """Of a GPU that has done nothing until somebody waits for it."""

    waited = 0

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        Event.waited += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readbacks as on a GPU; their events are made up, their page-locked memory is none."""
    Event.waited = 0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(readback, "_page_locked", torch.empty_like)


def test_values_of_a_gpu_come_back_at_the_next_look_with_what_they_are_of(gpu: None):
    behind, at_once = Readback(torch.device("cuda")), Readback(torch.device("cpu"))
    values = torch.tensor([1.0, 2.0])
    assert behind.exchange(values, "first") is None and Event.waited == 0
    values += 1
    assert behind.exchange(values, "second") == ([1.0, 2.0], "first")
    assert behind.exchange(values, "third") == ([2.0, 3.0], "second") and Event.waited == 2
    assert at_once.exchange(values, "now") == ([2.0, 3.0], "now")


@pytest.fixture
def look_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.loop.watch.MAX_STEPS", 1)


def spoil_steps(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    honest, taken = engine.training_step, []

    def step(state: TrainState, images: torch.Tensor, *others: Any) -> torch.Tensor:
        taken.append(1)
        return honest(state, images * float("nan") if len(taken) in steps else images, *others)

    monkeypatch.setattr(engine, "training_step", step)


def behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.build.Readback", lambda device: Readback(torch.device("cuda")))


def test_on_a_gpu_a_loss_that_is_not_finite_ends_the_run_one_look_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: None, look_after_every_step: None
):
    behind(monkeypatch)
    spoil_steps(monkeypatch, {2})
    with pytest.raises(TrainError, match=r"the loss is not finite in epoch 1, at or before step 3"):
        train(tmp_path, prune__method="none")


def test_on_a_gpu_nothing_is_saved_that_was_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: None, look_after_every_step: None
):
    behind(monkeypatch)
    spoil_steps(monkeypatch, {3})
    with pytest.raises(TrainError, match=r"the loss is not finite in epoch 1, at or before step 3"):
        train(tmp_path, prune__method="none", run__save_every_minutes=1e-9)


def test_a_run_that_is_told_late_makes_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: None, look_after_every_step: None
):
    at_once = train(tmp_path / "one")
    behind(monkeypatch)
    late = train(tmp_path / "other")
    losses = [[event["train_loss"] for event in events(log, "epoch")] for log in (at_once, late)]
    assert losses[0] == losses[1]
