"""The same share of every group: by a share, by a FLOPs reduction; the group lasso; filters held at zero."""

import pytest
import torch
from cup_twins import make_network
from torch import nn

import cup


def test_a_share_of_every_group_goes_rounded_down():
    model, images = make_network("lenet")
    groups = cup.channel_groups(model, images)
    assert cup.uniform_widths(groups, 0.3) == {"conv1": 14, "conv2": 35, "fc1": 350}
    assert cup.uniform_widths(groups, 0.29) == {"conv1": 15, "conv2": 36, "fc1": 355}
    assert cup.uniform_widths(groups, 0.3, cup.PlanOptions(round_to=8)) == {"conv1": 16, "conv2": 40, "fc1": 352}
    assert cup.uniform_widths(groups, 0.58)["conv2"] == 21, "50 x 0.58 is 28.999... in binary numbers"
    assert set(cup.uniform_widths(groups, 0.999).values()) == {1}
    with pytest.raises(cup.CupError, match="found 1, allowed: from 0 to below 1"):
        cup.uniform_widths(groups, 1)


@pytest.mark.parametrize("scope", ["inner", "all"])
def test_residual_streams_are_narrowed_with_scope_all_only(scope: str):
    groups = cup.channel_groups(*make_network("resnet18"))
    widths = cup.uniform_widths(groups, 0.5, cup.PlanOptions(scope=scope))
    assert set(widths) == {group.name for group in cup.prunable_groups(groups, scope)}
    assert ("conv1" in widths) == (scope == "all")


@pytest.mark.parametrize("name", ["lenet", "resnet20_cifar", "resnet18", "resnet50"])
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_one_share_lands_on_a_reduction_of_the_full_network(name: str, scope: str):
    """Also from widths that are below the full ones already; groups differ by one channel from one share at most."""
    model, images = make_network(name)
    groups, dense = cup.channel_groups(model, images), cup.complexity(model, images)
    first = cup.prunable_groups(groups, scope)[0]
    start = cup.plan_first_channels(groups, {first.name: first.width - 1})
    groups = cup.apply_plan(model, start, groups).groups
    view, options = cup.View(model, groups, dense=dense), cup.PlanOptions(scope=scope)
    widths = cup.uniform_widths_at(view, 1.6, options)
    plan = cup.plan_first_channels(groups, widths)
    assert dense.flops / cup.flops_after(model, groups, plan, view.now) == pytest.approx(1.6, rel=0.01)
    full = {group.name: group.width for group in groups}
    shares = [(1 - (width + 1) / full[name], 1 - (width - 1) / full[name]) for name, width in widths.items()]
    assert max(low for low, _ in shares) <= min(high for _, high in shares)


def test_a_reduction_out_of_reach_gives_the_narrowest_widths():
    model, images = make_network("lenet")
    view = cup.View(model, cup.channel_groups(model, images))
    assert set(cup.uniform_widths_at(view, 1e9).values()) == {1}
    with pytest.raises(cup.CupError, match="target reduction: found 1, allowed"):
        cup.uniform_widths_at(view, 1)


# --- PruneTrain's lasso ---


def slow_lasso(model: nn.Module, groups: list[cup.ChannelGroup]) -> torch.Tensor:
    """The root of the sum of squares of what writes each channel, and of what reads it, layer by layer."""
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for place in (*group.producers, *group.consumers):
            layer = model.get_submodule(place.module)
            outputs_first = not isinstance(layer, nn.ConvTranspose2d)
            for channel in range(group.width):
                indices = [i for i, c in enumerate(place.channel_of_index) if c == channel]
                rows = (place.axis == "out") == outputs_first
                weights = layer.weight[indices] if rows else layer.weight[:, indices]
                total = total + weights.square().sum().sqrt()
    return total


@pytest.mark.parametrize("name", ["lenet", "resnet20_cifar", "mobile_like", "dense_like", "many_layers"])
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_the_group_lasso_and_its_gradient_are_those_of_the_plain_formula(name: str, scope: str):
    model, images = make_network(name)
    if name == "lenet":
        cup.shrink_to(model, {"fc1": 30}, images)
    groups = cup.prunable_groups(cup.channel_groups(model, images), scope)
    model.double()
    parameters = [parameter for key, parameter in model.named_parameters() if key.endswith("weight")]
    fast, slow = cup.GroupLasso(groups)(model), slow_lasso(model, groups)
    assert fast.item() == pytest.approx(slow.item(), rel=1e-12)
    gradients = [torch.autograd.grad(value, parameters, allow_unused=True) for value in (fast, slow)]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_an_empty_channel_has_a_gradient_of_zero():
    model, images = make_network("lenet")
    with torch.no_grad():
        model.conv1.weight[3] = 0
    cup.GroupLasso(cup.channel_groups(model, images))(model).backward()
    assert not model.conv1.weight.grad[3].any() and model.conv1.weight.grad[4].any()


# --- filters held at zero ---


def test_gradients_of_the_filters_that_go_are_masked_and_no_others():
    model, images = make_network("many_layers")
    groups = cup.channel_groups(model, images)
    plan = cup.plan_by_counts(model, groups, {"up": 3, "mix": 5}, cup.PlanOptions(scope="all"))
    model(images).square().sum().backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    cup.mask_gradients(model, cup.filters_that_go(plan, groups))
    for name, parameter in model.named_parameters():
        expected = before[name]
        layer = name.removesuffix(".weight")
        if layer in ("up", "mix") and name.endswith("weight"):
            gone = [channel for channel in range(plan.widths[layer]) if channel not in plan.kept[layer]]
            (expected.transpose(0, 1) if layer == "up" else expected)[gone] = 0
        assert torch.equal(parameter.grad, expected), name
