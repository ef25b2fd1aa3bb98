"""SFP and FPGM in training: which filters are zeroed against a twin, held at zero or not, and a whole run."""

import dataclasses
from pathlib import Path

import pytest
import torch
from launching import events, interrupted, numbers, train, train_undisturbed
from torch import nn

import cup
from train.checkpoint.file import load_checkpoint
from train.checkpoint.network import load_network, stored_plans
from train.methods import PruneConfig, SoftRateConfig, build_method

RATE = 0.4


def small_network(bias: bool = True) -> nn.Module:
    torch.manual_seed(1)
    first = [nn.Conv2d(1, 10, 3, bias=bias), nn.BatchNorm2d(10), nn.ReLU()]
    second = [nn.Conv2d(10, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(8 * 4 * 4, 3))


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, after_backward) -> None:
    """Five steps on made images."""
    generator = torch.Generator().manual_seed(number)
    for _ in range(5):
        images, labels = torch.randn(16, 1, 8, 8, generator=generator), torch.arange(16) % 3
        nn.functional.cross_entropy(model(images), labels).backward()
        after_backward(model)
        optimizer.step()
        optimizer.zero_grad()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)


def with_the_method(
    criterion: str, grad_mask: bool, bias: bool = True
) -> tuple[nn.Module, list[dict[str, tuple[int, ...]]]]:
    """The network after two epochs, and the filters that went before them and after each."""
    model = small_network(bias)
    config = PruneConfig(
        method="soft_rate",
        criterion=criterion,
        sequential=False,
        soft_rate=SoftRateConfig(rate=RATE, grad_mask=grad_mask),
    )
    method, groups = build_method(config, epochs=3), cup.channel_groups(model, torch.zeros(1, 1, 8, 8))
    method.begin(cup.View(model, groups))
    optimizer, gone = sgd(model), []
    for number in range(3):
        if number > 0:
            epoch(model, optimizer, number, method.after_backward)
        view = cup.View(model, groups)
        action = method.epoch_end(number, view) if number > 0 else method.epoch_start(1, view)
        assert action.soft
        cup.zero_filters(model, action.plan, groups)
        method.after_action(action, cup.View(model, groups))
        kept = action.plan.kept
        gone.append({name: tuple(i for i in range(action.plan.widths[name]) if i not in kept[name]) for name in kept})
    return model, gone


def twin(criterion: str, grad_mask: bool) -> tuple[nn.Module, list[dict[str, tuple[int, ...]]]]:
    """The same by the papers' text: norms or sums of distances of each layer's filters, one by one."""
    model = small_network()
    optimizer, gone = sgd(model), []

    def choose() -> dict[str, tuple[int, ...]]:
        chosen = {}
        for name in ("0", "3"):
            filters = [row.flatten().double() for row in model.get_submodule(name).weight.detach()]
            if criterion == "l2":
                scores = [float(one.norm()) for one in filters]
            else:
                scores = [sum(float((one - other).norm()) for other in filters) for one in filters]
            # Of filters that are equal, as those at zero are, the one with the lowest id stays.
            order = sorted(range(len(filters)), key=lambda i: (scores[i], -i))
            chosen[name] = tuple(sorted(order[: int(len(filters) * RATE)]))
        return chosen

    def mask(model: nn.Module) -> None:
        for name, filters in gone[0].items() if grad_mask else ():
            for i in filters:
                model.get_submodule(name).weight.grad[i] = 0

    for number in range(3):
        if number > 0:
            epoch(model, optimizer, number, mask)
        gone.append(gone[0] if grad_mask and gone else choose())
        for name, filters in gone[-1].items():
            for i in filters:
                model.get_submodule(name).weight.data[i] = 0
    return model, gone


@pytest.mark.parametrize("grad_mask", [False, True])
@pytest.mark.parametrize("criterion", ["l2", "gm"])
def test_what_is_zeroed_before_and_after_two_epochs_is_what_the_papers_say(criterion: str, grad_mask: bool):
    (model, gone), (plain, expected) = with_the_method(criterion, grad_mask), twin(criterion, grad_mask)
    assert gone == expected
    assert [len(filters) for filters in gone[0].values()] == [4, 3]
    assert (gone[2] == gone[0]) == grad_mask, "filters must be able to grow back, or none of them"
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_without_biases_and_behind_batch_norm_and_relu_nothing_grows_back():
    """docs/methods.md says so of ResNets: the offset of batch norm begins at 0, where ReLU passes no gradient."""
    runs = []
    for grad_mask in (False, True):
        model, gone = with_the_method("l2", grad_mask, bias=False)
        assert gone[0] == gone[1] == gone[2]
        runs.append(model.state_dict())
    assert all(torch.equal(value, runs[1][key]) for key, value in runs[0].items())


SFP = {
    "prune__method": "soft_rate", "prune__criterion": "l2", "prune__soft_rate__rate": 0.3,
    "prune__target_reduction": "null",
}  # fmt: skip


def test_a_run_zeroes_softly_and_cuts_after_the_last_epoch(tmp_path: Path):
    log = train(tmp_path, **SFP, train__ema_decay=0.5)
    gone = {"conv1": 6, "conv2": 15, "fc1": 150}
    assert [(e["epoch"], e["step"], e["removed"]) for e in events(log, "zero")] == [
        (1, 0, gone),
        (1, 4, gone),
        (2, 8, gone),
    ]
    assert [(e["epoch"], e["step"], e["removed"]) for e in events(log, "resize")] == [(3, 12, gone)]
    assert [e["flops_reduction"] for e in events(log, "epoch")][:2] == [1, 1]
    assert log[-1]["flops_reduction"] > 1.5
    assert events(log, "run")[0]["method"] == "SFP"
    network = load_network(tmp_path / "tiny/last.pt")
    assert network.model.conv2.weight.shape == (35, 14, 5, 5)


def test_widths_change_only_before_the_epoch_after_the_last_one():
    """Zeroing leaves them alone, so blocks may run compiled."""
    model = small_network()
    view = cup.View(model, cup.channel_groups(model, torch.zeros(1, 1, 8, 8)))
    config = PruneConfig(method="soft_rate", last_epoch=3, every=2, soft_rate=SoftRateConfig(rate=RATE))
    method = build_method(config, epochs=5)
    method.begin(view)
    assert [method.may_resize(epoch, view) for epoch in range(1, 6)] == [False, False, False, True, False]
    actions = [method.epoch_end(epoch, view) for epoch in range(1, 6)]
    assert [action and action.soft for action in actions] == [None, True, False, None, None]


def test_the_share_lands_on_the_target_and_the_cut_may_come_earlier(tmp_path: Path):
    changes = {"prune__soft_rate__rate": "null", "prune__target_reduction": 2.0, "prune__last_epoch": 2}
    log = train(tmp_path, **(SFP | changes | {"prune__criterion": "gm"}))
    assert events(log, "run")[0]["method"] == "FPGM"
    assert [e["epoch"] for e in events(log, "zero")] == [1, 1]
    assert [e["flops_reduction"] for e in events(log, "epoch")] == [1] + [pytest.approx(2, rel=0.01)] * 2


@pytest.mark.parametrize("at_step", [3, 6, 11])
def test_masked_filters_stay_at_zero_over_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int
):
    monkeypatch.setattr("train.loop.watch.MAX_STEPS", 1)
    settings = SFP | {"prune__soft_rate__grad_mask": "true", "run__save_every_minutes": 1e-9}
    undisturbed = train_undisturbed(tmp_path / "a", **settings)
    again = interrupted(tmp_path / "b", monkeypatch, at_step, **settings)
    assert numbers(again) == numbers(undisturbed)
    one, other = (load_checkpoint(tmp_path / side / "tiny/last.pt") for side in "ab")
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
    assert stored_plans(one) == stored_plans(other)
    assert events(again, "run")[0]["method"] == "SFP (gradients masked)"


def test_clusters_with_filters_at_zero_are_not_folded():
    config = PruneConfig(method="hard_ramp", target_reduction=2.0, fold=True)
    with pytest.raises(ValueError, match="fold: found true, allowed with soft_rate: false"):
        dataclasses.replace(config, method="soft_rate")
