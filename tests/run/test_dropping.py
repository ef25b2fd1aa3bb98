"""Runs whose cuts drop residual blocks: they go on to the bit, and all that reads a checkpoint knows the blocks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import EVERY_STEP, events, interrupted, numbers, train, write_network
from torch import nn

import cup
from cup.networks import OWN_MODELS
from cup.tracing.groups import is_within
from data import Preprocessing
from launch import evaluate, export, prune
from train.checkpoint.file import load_checkpoint
from train.checkpoint.network import Architecture, StoredNetwork, load_network, save_network, stored_plans
from train.config import ModelConfig
from train.log.rundir import read_log
from train.narrowing import plan_narrowing
from train.network.models import build_model
from train.prune import cut_network

# On a T4 many kernels of so small a network take no longer than their launch, whatever the width.
DROPS = EVERY_STEP | {
    **{"model__name": "resnet20_cifar", "data__channels": 3, "data__image_size": 16, "data__resize_size": 16},
    **{"train__epochs": 2, "train__ema_decay": 0.5},
    **{"prune__target_reduction": "null", "prune__target_speedup": 1.25, "prune__hard_ramp__kind": "speedup"},
    **{"prune__scope": "all", "prune__device": "t4", "prune__drop_blocks": True, "prune__last_epoch": 2},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which has dropped blocks in its second epoch."""
    root = tmp_path_factory.mktemp("dropping")
    train(root / "a", **DROPS)
    return root


def test_the_run_lands_on_its_target_and_says_what_went(root: Path):
    log = events_of(root / "a")
    (resize,) = events(log, "resize")
    (note,) = [event["message"] for event in events(log, "note") if "blocks dropped" in event["message"]]
    gone = {f"{name}.conv1" for name in note.removeprefix("epoch 2: blocks dropped: ").split(", ")}
    before, after = events(log, "epoch")
    assert before["widths"].keys() - after["widths"].keys() == gone and gone < resize["removed"].keys()
    assert 1.25 <= after["step_speedup"] <= 1.2625 and after["params"] < before["params"]


def test_a_run_that_is_broken_off_after_blocks_were_dropped_goes_on_to_the_bit(root: Path, monkeypatch):
    again = interrupted(root / "b", monkeypatch, 6, **DROPS)  # in the second step without them
    assert numbers(again) == numbers(events_of(root / "a"))
    stored = [load_checkpoint(root / run / "tiny/last.pt") for run in "ab"]
    for part in ("model", "ema"):
        assert stored[0][part].keys() == stored[1][part].keys()
        assert all(torch.equal(stored[0][part][name], stored[1][part][name]) for name in stored[0][part])
    momenta = [[s["momentum_buffer"] for s in content["optimizer"]["state"].values()] for content in stored]
    assert all(map(torch.equal, *momenta)) and len(momenta[0]) == len(momenta[1])


def test_evaluation_export_another_cut_and_a_run_from_its_widths_know_the_blocks(root: Path, tmp_path: Path, capsys):
    last, folder, cut = root / "a/tiny/last.pt", tmp_path / "folder", tmp_path / "cut.pt"
    (dropped,) = [plan.dropped for plan in stored_plans(load_checkpoint(last)) if plan.dropped]
    network = load_network(last)
    assert all(isinstance(network.model.get_submodule(name), nn.Identity) for name in dropped)
    images = torch.randn(2, 3, 16, 16)
    assert export.main([str(last), "--format", "timm", "--out", str(folder)]) == 0
    with torch.no_grad():
        assert torch.equal(cup.load(folder)(images), network.model.eval()(images))
    assert tuple(cup.read_saved(folder).dropped) == dropped
    assert evaluate.main([str(last)]) == 0
    (tmp_path / "counts.json").write_text('{"layer3.0.conv1": 20}')
    counts = ["--counts", str(tmp_path / "counts.json"), "--criterion", "l2"]
    assert prune.main([str(last), *counts, "--out", str(cut)]) == 0
    assert load_network(cut).groups[0].network.dense is not None
    assert "FR of the full network" in capsys.readouterr().out
    full = build_model("resnet20_cifar", 10)
    groups = cup.channel_groups(full, images)
    plan = plan_narrowing(ModelConfig(name="resnet20_cifar", widths=str(last)), full, groups, "all")
    cup.apply_plan(full, plan, groups)
    assert cup.complexity(full, images) == cup.complexity(network.model, images)


def test_frozen_layers_may_go_with_their_block(root: Path, tmp_path: Path):
    (dropped, *_) = [plan.dropped for plan in stored_plans(load_checkpoint(root / "a/tiny/last.pt")) if plan.dropped]
    changes = DROPS | {"prune__target_speedup": 1.3, "prune__every": 1, "run__save_every_minutes": 10}
    log = train(tmp_path, **changes, train__freeze=f"{dropped[0]}.bn1, layer2.0.bn1")
    assert any("blocks dropped" in event["message"] for event in events(log, "note"))
    network = load_network(tmp_path / "tiny/last.pt").model
    assert network.layer2[0].bn1.num_batches_tracked == 0 < network.layer2[0].bn2.num_batches_tracked
    assert isinstance(network.get_submodule(dropped[0]), nn.Identity)


def two_alike(num_classes: int) -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes))
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), Plain(), Plain(), *head)


def test_a_run_whose_cut_has_left_one_repeated_block_goes_on_compiled(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(OWN_MODELS, "alike", two_alike)
    compiled: list[object] = []
    monkeypatch.setattr(Plain, "compile", lambda self, **options: compiled.append(self))
    changes = DROPS | {"model__name": "alike", "train__compile": "blocks", "train__compile_steps": 1}
    again = interrupted(tmp_path, monkeypatch, 6, **changes)
    (dropped,) = [plan.dropped for plan in stored_plans(load_checkpoint(tmp_path / "tiny/last.pt")) if plan.dropped]
    assert dropped in (("2",), ("3",)) and len(events(again, "done")) == 1 and len(compiled) == 4


def events_of(root: Path) -> list[dict]:
    return read_log(root / "tiny/log.jsonl")


def test_blocks_can_be_dropped_for_a_latency_alone(tmp_path: Path, capfd):
    """On the command line, from dense weights."""
    source, out = str(tmp_path / "full.pt"), tmp_path / "fast.pt"
    write_network(Path(source), "resnet20_cifar")
    assert prune.main([source, "--reduction", "2", "--drop-blocks"]) == 2
    assert "--drop-blocks goes with --latency" in capfd.readouterr().err
    request = [source, "--latency", "150us", "--device", "t4", "--out", str(out), "--criterion", "l2"]
    assert prune.main([*request, "--round-to", "1000"]) == 1
    assert "--drop-blocks lets whole blocks go" in capfd.readouterr().err
    assert prune.main([*request, "--drop-blocks"]) == 0
    assert "blocks dropped: layer" in capfd.readouterr().out
    assert load_network(out).plans[0].dropped


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(torch.relu(self.conv1(x)))


class Rectified(Plain):
    """Can be dropped where x came out of a ReLU: behind a `Plain`, once that has gone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(x))


def pair_of_blocks(num_classes: int) -> nn.Module:
    blocks = nn.Sequential(Plain(), Rectified())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes))
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), blocks, *head)


def test_what_two_cuts_dropped_one_after_the_other_is_rebuilt(tmp_path: Path, monkeypatch):
    """And the trees of each cut are those of what it leaves."""
    monkeypatch.setitem(OWN_MODELS, "pair", pair_of_blocks)
    architecture = Architecture(name="pair", num_classes=5, input_shape=(3, 16, 16))
    model, images = pair_of_blocks(5).eval(), torch.randn(2, 3, 16, 16)
    groups = cup.channel_groups(model, images)
    network = StoredNetwork(architecture, cup.complexity(model, images), model, (), groups, None, None)
    for name in ("2.0", "2.1"):
        (block,) = cup.residual_blocks(network.model, network.groups)
        assert block.name == name
        widths = {group.name: group.width for group in network.groups if not group.frozen}
        plan = cup.plan_first_channels(network.groups, widths, [block])
        trees = prune._trees(network, network.groups, plan, cup.PlanOptions(scope="all"))
        layers = [place.module for tree in trees for place in tree.group.places]
        assert "0" in layers and not any(is_within(layer, name) for layer in layers)
        cut = cut_network(network, plan, network.groups)
        network = cut.network
    save_network(tmp_path / "cut.pt", network, cut.widths)
    assert str(load_network(tmp_path / "cut.pt").model) == str(network.model)
    assert export.main([str(tmp_path / "cut.pt"), "--format", "timm", "--out", str(tmp_path / "folder")]) == 0
    with torch.no_grad():
        assert torch.equal(cup.load(tmp_path / "folder")(images), network.model(images))
    full = pair_of_blocks(5)
    groups = cup.channel_groups(full, images)
    config = ModelConfig(name="pair", widths=str(tmp_path / "cut.pt"))
    cup.apply_plan(full, plan_narrowing(config, full, groups, "all"), groups)
    assert str(full) == str(network.model)


class Mixing(nn.Module):
    """Freezes the channels of its stream."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(torch.relu(self.conv1(x.softmax(1))))


def mixing(num_classes: int) -> nn.Module:
    head = (nn.Conv2d(32, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), Mixing(), *head)


def test_a_latency_at_the_size_of_validation_keeps_what_a_dropped_block_had_frozen(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(OWN_MODELS, "mixing", mixing)
    images, model = torch.empty(1, 3, 16, 16), mixing(5)
    groups, sizes = cup.channel_groups(model, images), {"image_size": 16, "resize_size": 16, "val_size": 24}
    architecture = Architecture(name="mixing", num_classes=5, input_shape=(3, 16, 16))
    full = StoredNetwork(architecture, cup.complexity(model, images), model, (), groups, None, None)
    plan = cup.plan_first_channels(groups, {}, cup.residual_blocks(model, groups))
    cut = cut_network(replace(full, preprocessing=Preprocessing(**sizes)), plan, groups)
    save_network(tmp_path / "cut.pt", cut.network, cut.widths)
    again = [str(tmp_path / "cut.pt"), "--latency", "1us", "--device", "t4", "--batch", "4096", "--criterion", "l2"]
    assert prune.main([*again, "--out", str(tmp_path / "fast.pt")]) == 0
    assert load_network(tmp_path / "fast.pt").model[0].out_channels == 32
