"""torch-pruning as the oracle: given the same indices, the same shapes and the same outputs."""

import copy

import pytest
import torch
from cup_twins import assert_close, make_network, plan_of, random_kept
from torch import nn

import cup

tp = pytest.importorskip("torch_pruning")


def prune_by_oracle(model, images, groups, kept):
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=images)
    for name, channels in kept.items():
        layer = model.get_submodule(name)
        width = next(group.width for group in groups if group.name == name)
        gone = [channel for channel in range(width) if channel not in channels]
        prune = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
        graph.get_pruning_group(layer, prune, idxs=gone).prune()


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
@pytest.mark.parametrize(
    ("name", "scope"),
    [
        *(("resnet18", "inner"), ("resnet18", "all"), ("resnet50", "all"), ("vgg16_bn", "inner")),
        *(("mobilenet_v2", "all"), ("squeezenet1_1", "inner"), ("googlenet", "inner"), ("mnasnet0_5", "all")),
        *(("efficientnet_b0", "inner"), ("convnext_tiny", "inner")),
        *(("vgg16_cifar", "inner"), ("resnet20_cifar", "inner"), ("lenet", "inner"), ("mlp", "inner")),
        ("dense_like", "all"),
    ],
)
def test_the_oracle_gets_the_same_network(name, scope):
    model, images = make_network(name)
    groups = cup.channel_groups(model, images)
    kept = random_kept(groups, seed=11, scope=scope)
    oracle = copy.deepcopy(model)
    cup.apply_plan(model, plan_of(groups, kept), groups)
    prune_by_oracle(oracle, images, groups, kept)
    ours, theirs = model.state_dict(), oracle.state_dict()
    assert {key: tuple(t.shape) for key, t in ours.items()} == {key: tuple(t.shape) for key, t in theirs.items()}
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key
    with torch.no_grad():
        assert_close(model.eval()(images), oracle.eval()(images))
