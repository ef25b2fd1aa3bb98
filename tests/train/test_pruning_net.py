"""PruningNet: the weights that it makes, the network that it is at some widths, and batch norm recalibrated."""

import copy
import math

import pytest
import torch
from launching import ALONE
from torch import nn

import cup
from cup import CupError, PlanOptions
from data import DataConfig, build_loaders
from train.loop.recalibrate import recalibrate
from train.network.models import build_model
from train.network.precision import Precision
from train.network.pruning_net import PruningNet, widths_at_scales

NETWORKS = {  # name: (channels, side, scope); residual, depthwise with squeeze-and-excitation, and behind a flatten
    "resnet20_cifar": (3, 32, "inner"),
    "resnet18": (3, 32, "all"),
    "mobilenet_v3_small": (3, 32, "all"),
    "lenet": (1, 28, "inner"),
}


def made(name: str, seed: int = 0, hidden: int = 4) -> tuple[nn.Module, PruningNet, torch.Tensor]:
    """The ordinary network, the PruningNet around a copy of it, and its images."""
    channels, side, scope = NETWORKS[name]
    torch.manual_seed(0)
    full = build_model(name, 10)
    images = torch.randn(6, channels, side, side)
    groups = cup.prunable_groups(cup.channel_groups(full, images), scope)
    widths = widths_at_scales(groups, 0.1, 31, PlanOptions())
    return full, PruningNet(copy.deepcopy(full), groups, widths, hidden, seed), images


def drawn_widths(net: PruningNet, epoch: int, step: int) -> dict[str, int]:
    """Widths that a draw leads to, as the shapes of a forward pass tell them."""
    net.draw(epoch, step)
    seen = {}
    layers = {group.producers[0].module: group for group in net.groups}
    handles = [
        net.network.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, group=group: seen.update({group.name: output.shape[1]})
        )
        for name, group in layers.items()
    ]
    group = net.groups[0]
    net.train()(torch.randn(4, *group.network.input_shape))
    for handle in handles:
        handle.remove()
    return seen


def test_a_weight_is_made_of_the_shares_of_channels_by_two_layers_and_cropped():
    """Against plain loops, for a convolution that reads a residual stream at full width and writes a searched group."""
    _, net, _ = made("resnet20_cifar")
    widths = {group.name: group.width for group in net.groups} | {"layer2.1.conv1": 13}
    weights = net.weights_at(widths)
    for name, read, written, shares in [
        ("layer2.1.conv1", 32, 13, [1.0, 13 / 32]),
        ("layer2.1.conv2", 13, 32, [13 / 32, 1.0]),
    ]:
        first, _, second = net.generators[list(net._generated).index(name)]
        hidden = [
            max(0.0, sum(first.weight[h, i].item() * shares[i] for i in range(2)) + first.bias[h].item())
            for h in range(4)
        ]
        assert weights[f"{name}.weight"].shape == (written, read, 3, 3)
        for o, i, y, x in [(0, 0, 0, 0), (written - 1, read - 1, 2, 2), (3, 7, 1, 2), (7, 3, 2, 0)]:
            place = ((o * 32 + i) * 3 + y) * 3 + x  # in the full weight
            plain = sum(second.weight[place, h].item() * hidden[h] for h in range(4)) + second.bias[place].item()
            assert math.isclose(weights[f"{name}.weight"][o, i, y, x].item(), plain, rel_tol=1e-4, abs_tol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_at_drawn_widths_is_that_of_the_ordinary_narrow_network_with_the_same_weights(name: str):
    full, net, images = made(name)
    for step in range(3):
        widths = drawn_widths(net, 1, step)
        narrow = copy.deepcopy(full)
        cup.shrink_to(narrow, widths, images)
        net.fill(narrow, widths)
        torch.manual_seed(1)
        expected = narrow.train()(images)
        torch.manual_seed(1)
        assert torch.equal(net.train()(images), expected)


def test_all_parameters_learn_at_any_widths_and_only_the_entries_in_use_change():
    _, net, images = made("resnet18")
    net.draw(1, 0)
    net.train()(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    generator = net.generators[list(net._generated).index("layer1.0.conv1")]
    gradient = generator[2].bias.grad.view(64, 64, 3, 3).abs().sum((2, 3))
    used = gradient > 0
    rows, columns = int(used.any(1).sum()), int(used.any(0).sum())
    assert rows < 64 and columns < 64 and used[:rows, :columns].all() and used.sum() == rows * columns


def test_running_statistics_are_kept_for_each_scale_apart():
    _, net, images = made("resnet20_cifar")
    norm = net.network.get_submodule("layer1.0.bn1")
    assert norm.running_mean.shape == (31, 16) and norm.weight is None
    net.draw(1, 0)
    net.train()(images)
    [changed] = {int(row) for row in norm.running_mean.nonzero()[:, 0]}
    before = norm.running_mean.clone()
    entries = before[changed].count_nonzero()
    assert entries == widths_at_scales(net.groups[:1], 0.1, 31, PlanOptions())["layer1.0.conv1"][changed]
    net.eval()(images)
    assert torch.equal(norm.running_mean, before)


def test_draws_depend_on_seed_epoch_and_step_alone_and_reach_every_scale():
    nets = [made("lenet", seed)[1] for seed in (0, 0, 1)]
    draws = []
    for net in nets:
        some = []
        for epoch, step in [(1, 0), (1, 1), (2, 0)]:
            net.draw(epoch, step)
            some.append(net._drawn)
        draws.append(some)
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 3
    every = set()
    for step in range(300):
        nets[0].draw(3, step)
        every.update(nets[0]._drawn)
    assert every == set(range(31))


def test_the_scales_are_the_authors_and_keep_to_the_allowed_widths():
    _, net, _ = made("resnet18")
    group = next(group for group in net.groups if group.width == 512)
    widths = widths_at_scales([group], 0.1, 31, PlanOptions())[group.name]
    assert widths == tuple(int(512 * (10 + 3 * number) / 100) for number in range(31))
    rounded = widths_at_scales([group], 0.1, 31, PlanOptions(round_to=64))[group.name]
    assert set(rounded) == {64, 128, 192, 256, 320, 384, 448, 512}


def test_a_new_pruning_net_begins_near_the_initial_weights_of_the_network():
    full, net, _ = made("resnet18", hidden=32)
    made_weight = net.weights_at({group.name: group.width for group in net.groups})["layer2.1.conv1.weight"]
    own = full.get_parameter("layer2.1.conv1.weight")
    assert 0.05 < (made_weight - own).std() / own.std() < 0.8


@pytest.mark.parametrize("name", ["densenet121", "convnext_tiny"])
def test_a_network_with_layers_that_cannot_be_generated_says_which(name: str):
    with torch.device("meta"):
        network = build_model(name, 10)
    groups = cup.prunable_groups(cup.channel_groups(network, torch.zeros(1, 3, 64, 64)), "all")
    with pytest.raises(CupError, match=r"\(\w+\) cannot be part of a PruningNet; allowed: convolutions, linear"):
        PruningNet(network, groups, widths_at_scales(groups, 0.1, 31, PlanOptions()), 4, 0)


def test_recalibration_is_the_plain_mean_over_the_batches():
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(108, 4))
    network[1].running_mean.fill_(7.0)
    config = DataConfig(loader="synthetic", synthetic_images=24, channels=1, image_size=8, resize_size=8, batch_size=8)
    [loader] = build_loaders(config, rank=0, world_size=1, device=ALONE.device, seed=0, splits=("train",))
    before = torch.get_rng_state()
    recalibrate(network.eval(), loader, Precision("fp32", ALONE.device))
    assert torch.equal(torch.get_rng_state(), before)
    loader.go_to(0)
    with torch.no_grad():
        features = [network[0](batch.images) for batch in loader]
    means = torch.stack([some.mean((0, 2, 3)) for some in features]).mean(0)
    variances = torch.stack([some.var((0, 2, 3)) for some in features]).mean(0)
    assert len(features) == 3 and not network[1].training
    torch.testing.assert_close(network[1].running_mean, means)
    torch.testing.assert_close(network[1].running_var, variances)
