"""Runs in this process, without a group: what the options of a run change."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from launching import ALONE, TINY, events, interrupted, numbers, train, write_image_folder
from torch import nn

from cup import CupError
from train.checkpoint.file import load_checkpoint, save_checkpoint
from train.config import parse_config
from train.errors import TrainError
from train.evaluate import evaluate_stored
from train.log.rundir import read_log
from train.network.optim import learning_rate


def test_equal_seeds_give_equal_runs_and_others_do_not(tmp_path: Path):
    changes = {"train__epochs": 2, "prune__last_epoch": 2}
    named = (("a", 0), ("b", 0), ("c", 1))
    one, two, three = (numbers(train(tmp_path / name, run__seed=seed, **changes)) for name, seed in named)
    assert one == two
    assert one != three


def test_a_dense_run_keeps_its_width_and_resizes_nothing(tmp_path: Path):
    log = train(tmp_path, prune__method="none")
    assert not events(log, "resize")
    assert {event["flops_reduction"] for event in events(log, "epoch")} == {1.0}
    assert {event["threshold"] for event in events(log, "epoch")} == {None}


def test_the_threshold_ramp_follows_the_paper_and_stops_on_its_target(tmp_path: Path):
    """t(e) = k (e - 1) + b; the cut that would overshoot lands on the target, and none comes after it."""
    log = train(
        tmp_path,
        prune__hard_ramp__kind="threshold",
        prune__hard_ramp__slope=0.03,
        prune__hard_ramp__offset=0.08,
        prune__target_reduction=1.6,
        train__epochs=6,
        prune__last_epoch=6,
    )
    epochs = events(log, "epoch")
    cut = [event for event in epochs if event["threshold"] is not None]
    for event in cut[:-1]:
        assert event["threshold"] == pytest.approx(0.03 * (event["epoch"] - 1) + 0.08)
    assert cut[-1]["flops_reduction"] == pytest.approx(1.6, rel=0.01)
    assert [event["threshold"] for event in epochs[len(cut) :]] == [None] * (6 - len(cut))
    assert 1 <= len(cut) < 6


def test_a_cut_that_removes_nothing_says_so(tmp_path: Path):
    log = train(
        tmp_path,
        prune__hard_ramp__kind="threshold",
        prune__hard_ramp__slope=0,
        prune__hard_ramp__offset=1e-6,
        train__epochs=1,
        prune__last_epoch=1,
    )
    assert not events(log, "resize")
    assert "removes nothing" in events(log, "note")[0]["message"]


def test_every_and_last_epoch_say_when_to_cut(tmp_path: Path):
    log = train(tmp_path, train__epochs=6, prune__every=2, prune__last_epoch=4)
    assert [event["epoch"] for event in events(log, "resize")] == [3, 4]


def test_widths_respect_round_to_and_min_channels(tmp_path: Path):
    log = train(tmp_path, prune__round_to=4, prune__min_channels=12, prune__target_reduction=1.5)
    widths = events(log, "epoch")[-1]["widths"]
    assert all(width % 4 == 0 and width >= 12 for width in widths.values())
    assert sum(widths.values()) < 20 + 50 + 500


def test_reset_momentum_trains_differently_from_carried_momentum(tmp_path: Path):
    carried, reset = (numbers(train(tmp_path / name, prune__momentum=name)) for name in ("carry", "reset"))
    assert carried[0] == reset[0]  # no cut before epoch 1
    assert carried[1] != reset[1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_keeps_fp32_weights_and_resizes(tmp_path: Path, precision: str):
    log = train(tmp_path, train__precision=precision)
    losses = [event["train_loss"] for event in events(log, "epoch")]
    assert losses[-1] < losses[0]
    assert len(events(log, "resize")) == 2
    stored = torch.load(tmp_path / "tiny/last.pt", weights_only=True)
    assert stored["model"]["fc1.weight"].dtype == torch.float32
    assert bool(stored["scaler"]) == (precision == "fp16")


def test_label_smoothing_raises_the_loss_of_a_good_network(tmp_path: Path):
    plain, smooth = (numbers(train(tmp_path / str(s), train__label_smoothing=s))[-1][1] for s in (0.0, 0.2))
    assert smooth > plain


def test_the_average_of_the_weights_is_what_is_evaluated_and_stored(tmp_path: Path):
    log = train(tmp_path, train__ema_decay=0.9)
    stored = torch.load(tmp_path / "tiny/last.pt", weights_only=True)
    average, weights = stored["ema"]["module.conv1.weight"], stored["model"]["conv1.weight"]
    assert average.shape == weights.shape
    assert not torch.equal(average, weights)
    result = evaluate_stored(tmp_path / "tiny/last.pt", ALONE).evaluation
    assert result.top1 == events(log, "epoch")[-1]["top1"]


def test_best_is_the_epoch_with_the_highest_top1(tmp_path: Path):
    log = train(tmp_path, train__epochs=4)
    best = max(event["top1"] for event in events(log, "epoch"))
    outcome = evaluate_stored(tmp_path / "tiny/best.pt", ALONE)
    assert outcome.evaluation.top1 == best == log[-1]["best_top1"]
    first = next(event for event in events(log, "epoch") if event["top1"] == best)
    assert outcome.cost["flops"] == first["flops"]


def test_a_run_that_lost_only_its_last_line_is_closed_without_training(tmp_path: Path):
    undisturbed = train(tmp_path)
    log = tmp_path / "tiny/log.jsonl"
    log.write_text("".join(json.dumps(event) + "\n" for event in undisturbed[:-1]))
    again = train(tmp_path)
    assert numbers(again) == numbers(undisturbed)
    assert again[-1]["event"] == "done"
    assert again[-1]["top1"] == undisturbed[-1]["top1"]


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path):
    undisturbed = train(tmp_path)
    log = tmp_path / "tiny/log.jsonl"
    log.write_text(json.dumps(undisturbed[0]) + '\n{"event": "ep')  # cut off in the middle of a line
    for checkpoint in (tmp_path / "tiny").glob("*.pt"):
        checkpoint.unlink()
    again = train(tmp_path)
    assert numbers(again) == numbers(undisturbed)
    assert len(events(again, "run")) == 1


class Noisy(nn.Module):
    """Batch norm and dropout: a resume that forgets a random state or a running mean trains on other numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 16, 5, stride=4), nn.BatchNorm2d(16)
        self.conv2, self.drop = nn.Conv2d(16, 8, 3), nn.Dropout(0.3)
        self.fc = nn.Linear(8 * 16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(self.conv2(self.norm(self.conv1(images)).relu()).relu()).flatten(1))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_interrupted_run_goes_on_with_the_random_numbers_and_the_scale_that_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
):
    monkeypatch.setattr("train.build.build_model", lambda *_: Noisy())
    monkeypatch.setattr("torch.amp.GradScaler", partial(torch.amp.GradScaler, growth_interval=3))
    changes = {"train__precision": precision, "train__epochs": 4, "prune__target_reduction": 1.5}
    undisturbed = train(tmp_path / "a", **changes)

    resumed = interrupted(tmp_path / "b", monkeypatch, 10, **changes)
    assert numbers(resumed) == numbers(undisturbed)
    scales = [torch.load(tmp_path / d / "tiny/last.pt", weights_only=True)["scaler"] for d in ("a", "b")]
    assert scales[0] == scales[1]


def test_a_network_that_does_not_take_the_smallest_images_is_an_error_before_training(tmp_path: Path):
    with pytest.raises(CupError, match=r"LeNet does not take inputs of shape \(1, 20, 20\)"):
        train(tmp_path, data__start_size=20, data__grow_epochs=2)
    assert not (tmp_path / "tiny").exists()


def test_what_the_exclude_list_takes_out_is_noted(tmp_path: Path):
    images = write_image_folder(tmp_path / "images", train=12)
    (images / "exclude.txt").write_text("train/class0/0.jpg\tbroken\ntrain/class0/1.jpg\nval/class1/2.jpg\n")
    log = train(tmp_path, data__loader="auto", data__path=images, data__threads=1, train__epochs=1, prune__last_epoch=1)
    notes = [event["message"] for event in events(log, "note")]
    assert f"{images}/exclude.txt leaves out 2 training and 1 validation images" in notes
    assert (events(log, "run")[0]["train_images"], events(log, "run")[0]["val_images"]) == (34, 17)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path: Path):
    with pytest.raises(TrainError, match=r"the loss is nan in epoch 1: lower optim\.lr"):
        train(tmp_path, optim__lr=1e30, prune__method="none")
    assert not (tmp_path / "tiny/last.pt").exists()


def test_a_resume_on_another_number_of_ranks_says_what_differs_and_counts_the_hours_of_both(tmp_path: Path):
    train(tmp_path, train__epochs=3)
    path = tmp_path / "tiny/last.pt"
    stored = load_checkpoint(path)
    stored["ranks"][0]["ledger"]["rank_s"] *= 2
    stored["ranks"] *= 2
    save_checkpoint(path, stored)
    log = tmp_path / "tiny/log.jsonl"
    log.write_text("".join(json.dumps(event) + "\n" for event in read_log(log)[:-1]))
    again = train(tmp_path, train__epochs=3)
    assert "resumed on 1 ranks, stored by 2" in events(again, "note")[0]["message"]
    stored_s = sum(stored["ranks"][0]["ledger"]["seconds"].values())
    assert again[-1]["gpu_hours"] == pytest.approx((again[-1]["time_s"] + stored_s) / 3600, rel=1e-3)


def test_the_log_shows_the_learning_rate_that_was_used(tmp_path: Path):
    config = parse_config([], "train.py", str(TINY))
    steps = 128 // 32
    for event in events(train(tmp_path), "epoch"):
        progress = event["epoch"] - 1 + (steps - 1) / steps
        assert event["lr"] == pytest.approx(learning_rate(config.optim, progress, 3))


def test_tensorboard_shows_the_numbers_with_their_units(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = train(tmp_path)
    board = EventAccumulator(str(tmp_path / "tiny/tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {"cup/flops_reduction(x)", "cup/threshold", "time/gpu_hours(h)", "time/data_wait(s)", "val/top1(%)"} <= tags
    shown = [point.value for point in board.Scalars("cup/flops_reduction(x)")]
    assert shown == pytest.approx([event["flops_reduction"] for event in events(log, "epoch")])


def test_with_a_moving_average_the_accuracy_of_the_weights_is_logged_too(tmp_path: Path):
    """An average changes nothing in training, so a run without one has these weights."""
    averaged = events(train(tmp_path / "a", train__ema_decay=0.9), "epoch")
    plain = events(train(tmp_path / "b"), "epoch")
    assert [line["raw_top1"] for line in averaged] == [line["top1"] for line in plain]
    assert [line["raw_top5"] for line in averaged] == [line["top5"] for line in plain]
    assert [line["top1"] for line in averaged] != [line["top1"] for line in plain]
    assert {line["raw_top1"] for line in plain} == {None}


def test_epochs_say_the_size_of_their_images(tmp_path: Path):
    grown = {"data__start_size": 16, "data__grow_epochs": 3, "data__size_step": 4}
    settings = {"model__name": "resnet20_cifar", "data__channels": 3, "prune__method": "none"}
    lines = events(train(tmp_path, **grown, **settings), "epoch")
    assert [line["image_size"] for line in lines] == [16, 20, 24]
    # Kernels are chosen for new images in the first step, as after a cut.
    assert [line["seconds"]["resize_warmup"] > 0 for line in lines] == [False, True, True]
