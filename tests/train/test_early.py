"""The early cut: when widths count as settled, and a whole run."""

from pathlib import Path

import pytest
import torch
from launching import events, interrupted, numbers, train, train_undisturbed

import cup
from train.methods import EarlyConfig, PruneConfig, build_method
from train.methods.early import Early, similarity
from train.network.models import build_model


def test_likeness_of_widths():
    assert similarity({"a": 4, "b": 10}, {"a": 4, "b": 10}) == 1
    assert similarity({"a": 4, "b": 10}, {"a": 6, "b": 10}) == pytest.approx((0.8 + 1) / 2)


def method(**changes: int | float) -> Early:
    settings = {"patience": 2, "similarity": 0.97} | {k: v for k, v in changes.items() if k != "last_epoch"}
    shared = {"method": "early", "criterion": "l2", "target_reduction": 2.0, "last_epoch": changes.get("last_epoch")}
    return build_method(PruneConfig(**shared, early=EarlyConfig(**settings)), epochs=10)


@pytest.mark.parametrize(
    ("changes", "first"),
    [({}, 6), ({"patience": 3}, 7), ({"first_epoch": 9}, 9), ({"last_epoch": 4}, 4), ({"similarity": 0.5}, 3)],
)
def test_it_cuts_once_the_widths_have_stayed_for_so_many_epochs(
    changes: dict[str, float], first: int, monkeypatch: pytest.MonkeyPatch
):
    """Widths go up and down until epoch 4 and then stay at 50, but for one channel."""
    widths = iter([20, 40, 20, 50, 51, 50, 50, 50, 50])
    plan = lambda *some: cup.PrunePlan({"a": tuple(range(next(widths)))}, {"a": 100})  # noqa: E731
    monkeypatch.setattr("train.methods.early.plan_to_target", plan)
    model, early = build_model("lenet", 10), method(**changes)
    view = cup.View(model, cup.channel_groups(model, torch.zeros(1, 1, 28, 28)))
    cuts = [early.epoch_start(epoch, view) is not None for epoch in range(1, first + 1)]
    assert cuts == [False] * (first - 1) + [True]


def test_after_the_cut_it_is_done():
    model = build_model("lenet", 10)
    early, groups = method(), cup.channel_groups(model, torch.zeros(1, 1, 28, 28))
    dense = cup.View(model, groups).now
    action = early.epoch_start(10, cup.View(model, groups))
    assert "have not settled by epoch 10" in action.plan.note
    resized = cup.apply_plan(model, action.plan, groups)
    view = cup.View(model, resized.groups, dense)
    assert not early.may_resize(10, view) and early.epoch_start(10, view) is None


EARLY = {
    "prune__method": "early", "prune__early__patience": 2, "prune__early__similarity": 0.5,
    "prune__early__first_epoch": 4, "train__epochs": 5, "prune__last_epoch": 5,
}  # fmt: skip


@pytest.mark.parametrize("at_step", [8, 13])
def test_a_run_is_cut_once_to_the_target_also_over_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int
):
    """The second kill comes right after the cut; the choices of the epochs before the first are remembered."""
    monkeypatch.setattr("train.loop.watch.MAX_STEPS", 1)
    settings = EARLY | {"run__save_every_minutes": 1e-9}
    undisturbed = train_undisturbed(tmp_path / "a", **settings)
    again = interrupted(tmp_path / "b", monkeypatch, at_step, **settings)
    assert numbers(again) == numbers(undisturbed)
    assert [event["epoch"] for event in events(undisturbed, "resize")] == [4]
    assert undisturbed[-1]["flops_reduction"] == pytest.approx(2, rel=0.01)
    assert any("have settled" in note["message"] for note in events(again, "note"))
    assert events(undisturbed, "run")[0]["method"] == "CUP, once, early"


def test_it_cuts_once_where_the_target_is_out_of_reach(tmp_path: Path):
    settings = {"prune__method": "early", "prune__target_reduction": 500, "train__epochs": 4, "prune__last_epoch": 4}
    log = train(tmp_path, **settings, prune__early__patience=1, prune__early__similarity=0.1)
    assert [event["epoch"] for event in events(log, "resize")] == [2]
    assert not [event for event in events(log, "note") if "removes nothing" in event["message"]]
