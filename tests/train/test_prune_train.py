"""PruneTrain in training: the weight of its penalty, which channels go, and a whole run."""

from pathlib import Path

import pytest
import torch
from launching import events, interrupted, numbers, train, train_undisturbed
from torch import nn

import cup
from train.checkpoint.file import load_checkpoint
from train.loop import engine
from train.methods import PruneConfig, PruneTrain, PruneTrainConfig, build_method

PRUNE_TRAIN = {
    "prune__method": "prune_train", "prune__prune_train__share": 0.95, "prune__prune_train__below": 0.02,
    "prune__target_reduction": "null", "optim__lr": 0.1, "train__epochs": 4, "prune__last_epoch": 4,
}  # fmt: skip


class Residual(nn.Module):
    """A stream that stem and b write and that a and fc read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        stream = self.stem(images).relu()
        return self.fc((stream + self.b(self.a(stream).relu())).mean((2, 3)))


def begun(model: nn.Module, scope: str = "all", **settings: float) -> tuple[PruneTrain, list[cup.ChannelGroup]]:
    config = PruneConfig(method="prune_train", scope=scope, every=2, prune_train=PruneTrainConfig(**settings))
    method, groups = build_method(config, epochs=5), cup.channel_groups(model, torch.zeros(1, 1, 8, 8))
    method.begin(cup.View(model, groups))
    return method, groups


def test_the_first_step_fixes_the_weight_so_that_the_penalty_is_its_share_of_the_whole():
    model = Residual()
    method, _ = begun(model, share=0.2)
    assert method.penalty(model) is None and method.wants_loss
    method.saw_loss(float("nan"))
    assert method.wants_loss
    method.saw_loss(2.3)
    assert not method.wants_loss
    penalty = method.penalty(model)
    assert penalty.item() / (penalty.item() + 2.3) == pytest.approx(0.2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3
    assert method.penalty(model).item() == pytest.approx(3 * penalty.item(), rel=1e-5), "the weight stays"
    again, _ = begun(model)
    again.load_state_dict(method.state_dict())
    assert again.penalty(model).item() == method.penalty(model).item() and not again.wants_loss


def test_a_channel_of_a_residual_stream_goes_only_where_all_layers_have_given_it_up():
    torch.manual_seed(0)
    model = Residual()
    method, groups = begun(model)
    with torch.no_grad():
        for channel, layers in enumerate(
            [("stem", "b", "a", "fc"), ("stem", "b", "a"), ("stem", "a", "fc"), ("b", "fc")]
        ):
            for name in layers:
                weight = model.get_submodule(name).weight
                (weight if name in ("stem", "b") else weight.transpose(0, 1))[channel] = 1e-5
        model.a.weight[2], model.b.weight[:, 2] = 1e-5, 1e-5  # an inner channel: written and read
        model.a.weight[3] = 1e-5  # written only
    view = cup.View(model, groups)
    assert [method.epoch_end(epoch, view) is not None for epoch in range(1, 6)] == [False, True, False, True, True]
    assert [method.may_resize(epoch, view) for epoch in range(1, 6)] == [False, False, True, False, True]
    plan = method.epoch_end(2, view).plan
    assert plan.kept == {"stem": (1, 2, 3, 4, 5), "a": (0, 1, 3, 4)}
    inner, _ = begun(model, scope="inner")
    assert inner.epoch_end(2, view).plan.kept == {"a": (0, 1, 3, 4)}
    with torch.no_grad():
        model.stem.weight[0] += 1
        model.b.weight[0, 2] = 1
    assert method.epoch_end(2, cup.View(model, groups)) is None, "nothing is empty"


def test_a_run_empties_channels_and_removes_them_until_the_target(tmp_path: Path):
    free = train(tmp_path / "free", **PRUNE_TRAIN)
    resizes = events(free, "resize")
    assert resizes and all(event["step"] % 4 == 0 for event in resizes)
    reached = free[-1]["flops_reduction"]
    assert reached > 1.2
    assert events(free, "run")[0]["method"] == "PruneTrain"
    target = 1 + (reached - 1) / 2
    log = train(tmp_path / "to", **(PRUNE_TRAIN | {"prune__target_reduction": target}))
    assert log[-1]["flops_reduction"] == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_penalty_is_added_from_the_second_step_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str):
    """Its weight comes of the first step's loss and lasso, in fp32 with bf16, too."""
    honest, seen = PruneTrain.penalty, []

    def penalty(self: PruneTrain, model: nn.Module) -> torch.Tensor | None:
        found = honest(self, model)
        seen.append((found, self._first_lasso))
        return found

    losses = []
    step = engine.training_step
    monkeypatch.setattr(PruneTrain, "penalty", penalty)
    monkeypatch.setattr(engine, "training_step", lambda *some: losses.append(step(*some)) or losses[-1])
    train(tmp_path, **(PRUNE_TRAIN | {"train__epochs": 1, "prune__last_epoch": 1}), train__precision=precision)
    assert seen[0][0] is None and all(found is not None for found, _ in seen[1:])
    assert all(found.dtype == torch.float32 for found, _ in seen[1:])
    weight = load_checkpoint(tmp_path / "tiny/last.pt")["method"]["state"]["weight"]
    assert weight == pytest.approx(0.95 / 0.05 * losses[0].item() / seen[0][1].item())


@pytest.mark.parametrize("at_step", [2, 14])
def test_an_interrupted_run_goes_on_with_the_weight_of_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int
):
    monkeypatch.setattr("train.loop.watch.MAX_STEPS", 1)
    settings = PRUNE_TRAIN | {"run__save_every_minutes": 1e-9}
    undisturbed = train_undisturbed(tmp_path / "a", **settings)
    again = interrupted(tmp_path / "b", monkeypatch, at_step, **settings)
    assert numbers(again) == numbers(undisturbed)
    assert events(undisturbed, "resize")
