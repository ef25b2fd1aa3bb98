"""How a search judges a network: against a plain twin."""

import copy
from pathlib import Path

import pytest
import torch
from launching import ALONE, train
from torch import nn

import cup
from data import build_search_loaders
from train.checkpoint.file import load_checkpoint
from train.network.models import build_model
from train.network.pruning_net import PruningNet
from train.search import SearchOptions, _Judge, _load

OPTIONS = SearchOptions(target_reduction=2, recalibration_batches=2)


PRUNING_NET = {
    "model__name": "resnet20_cifar", "data__channels": 3, "data__image_size": 16, "data__resize_size": 16,
    "data__synthetic_images": 160, "data__held_out": 6, "train__epochs": 2, "prune__last_epoch": 2,
    "prune__method": "meta_pruning", "prune__meta_pruning__hidden": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a PruningNet after two epochs on colour images of 16 x 16."""
    root = tmp_path_factory.mktemp("net")
    train(root, **PRUNING_NET)
    return root / "tiny/last.pt"


def test_training_draws_new_widths_for_each_step_and_for_all_pieces_of_it(tmp_path: Path, monkeypatch):
    honest, draws = PruningNet.draw, []

    def draw(self: PruningNet, epoch: int, step: int) -> None:
        draws.append((epoch, step))
        honest(self, epoch, step)

    monkeypatch.setattr(PruningNet, "draw", draw)
    train(tmp_path, **PRUNING_NET | {"train__accumulate": 2})
    assert draws == [(epoch, step) for epoch in (1, 2) for step in range(3)]


def test_a_network_is_judged_with_its_own_weights_and_statistics_on_the_images_held_out(checkpoint: Path):
    source = _load(checkpoint, OPTIONS, None)
    judge = _Judge(source, OPTIONS, ALONE, None)
    widths = {group.name: max(1, group.width // 2) for group in judge._pruning_net.groups}
    weights, full = load_checkpoint(checkpoint)["model"], build_model("resnet20_cifar", 10)
    narrow = copy.deepcopy(full)
    cup.shrink_to(narrow, widths, torch.zeros(1, 3, 16, 16))
    with torch.no_grad():
        for number, name in enumerate(judge._pruning_net._generated):
            layer, wide = narrow.get_submodule(name), full.get_submodule(name)
            shares = torch.tensor([layer.in_channels / wide.in_channels, layer.out_channels / wide.out_channels])
            u, a, v, b = (weights[f"generators.{number}.{key}"] for key in ("0.weight", "0.bias", "2.weight", "2.bias"))
            made = (v @ (u @ shares + a).clamp(min=0) + b).view(wide.weight.shape)
            layer.weight.copy_(made[: layer.out_channels, : layer.in_channels])
        for name, parameter in narrow.named_parameters():
            if f"network.{name}" in weights:
                parameter.copy_(weights[f"network.{name}"])
        for layer in narrow.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None  # the mean of all batches
        trained, held_out = build_search_loaders(
            source.config.data, recalibration_batches=2, device=ALONE.device, seed=source.config.run.seed
        )
        narrow.train()
        for batch in trained:
            narrow(batch.images)
        narrow.eval()
        hits = [(narrow(b.images).argmax(1) == b.labels)[b.valid] for b in held_out]
    top1 = 100 * torch.cat(hits).float().mean().item()
    assert 15 < top1 < 100 and len(torch.cat(hits)) == 60
    assert judge.top1(widths) == pytest.approx(top1)
    assert judge.reduction(widths) == pytest.approx(
        cup.complexity(full, torch.zeros(1, 3, 16, 16)).flops / cup.complexity(narrow, torch.zeros(1, 3, 16, 16)).flops
    )
