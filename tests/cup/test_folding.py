"""Folding: equal channels become one without a difference, and the arithmetic of unequal ones is as written."""

import copy
import json

import numpy as np
import pytest
import torch
from cup_twins import assert_close, make_network, plan_of
from torch import nn

import cup
from cup.criteria.ward import clusters_of
from cup.tracing.layers import find_layer, has_no_tensors, weight_dim

CUTS = [
    *(("resnet18", "inner"), ("resnet18", "all"), ("resnet20_cifar", "inner"), ("resnet20_cifar", "all")),
    ("vgg16_cifar", "inner"),
    *(("lenet", "inner"), ("mlp", "inner"), ("mobile_like", "all"), ("dense_like", "all"), ("squeeze_excite", "all")),
    ("many_layers", "all"),
]
FOLDING = cup.PlanOptions(fold=True)


def random_clusters(group, seed=0):
    """For each channel one that stands for it, of about a third of them."""
    generator = np.random.default_rng([seed, group.width])
    kept = np.sort(generator.permutation(group.width)[: max(1, group.width // 3)])
    into_C = generator.choice(kept, group.width)
    into_C[kept] = kept
    return tuple(into_C.tolist())


def folding_plan(groups, folded):
    plan = plan_of(groups, {name: sorted(set(into)) for name, into in folded.items()})
    return cup.PrunePlan(plan.kept, plan.widths, folded=folded)


def tensors_of(model, place):
    """(tensor, dimension) of all that a layer has for each entry that it writes."""
    layer = find_layer(model, place.module)
    if isinstance(layer, torch.Tensor):
        return [(layer, weight_dim(layer, "out"))]
    if has_no_tensors(layer):
        return []
    found = [(layer.weight, weight_dim(layer, "out"))]
    found += [(getattr(layer, key, None), 0) for key in ("bias", "running_mean", "running_var")]
    return [(tensor, dim) for tensor, dim in found if tensor is not None]


@torch.no_grad()
def make_equal(model, group, into):
    """Give all channels of a cluster the weights of the one that stands for it, whatever reads them."""
    for place in group.producers + group.followers:
        of_channel = [np.flatnonzero(place.channel_of_index == channel) for channel in range(group.width)]
        for tensor, dim in tensors_of(model, place):
            for channel, stands in enumerate(into):
                stays = tensor.index_select(dim, torch.from_numpy(of_channel[stands]))
                tensor.index_copy_(dim, torch.from_numpy(of_channel[channel]), stays)


def foldable(name, scope):
    """A network in double precision, with groups; layer norm is left out: it looks at how many channels there are."""
    model, images = make_network(name)
    groups = cup.channel_groups(model, images)
    prunable = [
        group
        for group in cup.prunable_groups(groups, scope)
        if not any(isinstance(find_layer(model, place.module), nn.LayerNorm) for place in group.followers)
    ]
    return model.double(), images.double(), groups, prunable


@pytest.mark.parametrize(("name", "scope"), CUTS)
def test_equal_channels_are_folded_without_a_difference_in_eval_and_in_train_mode(name, scope):
    model, images, groups, prunable = foldable(name, scope)
    folded = {group.name: random_clusters(group) for group in prunable}
    for group in prunable:
        make_equal(model, group, folded[group.name])
    before = copy.deepcopy(model)
    resized = cup.apply_plan(model, folding_plan(groups, folded), groups)
    assert sum(group.width for group in resized.groups) < sum(group.width for group in groups)
    for is_training in (False, True):
        with torch.no_grad():
            assert_close(model.train(is_training)(images), before.train(is_training)(images))


def test_channels_that_batch_norm_scales_differently_count_by_their_gain():
    """Proportional filters, and proportional factors and offsets of batch norm: channels equal but for their size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten()).double()
    images = torch.randn(8, 3, 8, 8, dtype=torch.float64)
    groups = cup.channel_groups(model, images)
    conv, norm = model[0], model[1]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 0.5, 0.7, 2.0, 0.6, 1.5]))
        norm.bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.6, 0.1, 0.45]))
        for channel, size in ((3, 1.7), (5, 0.4)):  # like channel 0, twice and one and a half times as strong
            conv.weight[channel] = size * conv.weight[0]
            conv.bias[channel] = size * conv.bias[0]
    before = copy.deepcopy(model)
    norm.eps = before[1].eps = 1e-14
    cup.apply_plan(model, folding_plan(groups, {"0": (0, 1, 2, 0, 4, 0)}), groups)
    assert_close(model.train()(images), before.train()(images))
    assert_close(norm.weight, torch.tensor([1.5, 0.5, 0.7, 0.6]))


@pytest.mark.parametrize(("name", "scope"), [("resnet20_cifar", "inner"), ("mobile_like", "all"), ("lenet", "inner")])
def test_weights_statistics_momentum_and_average_are_those_of_plain_loops(name, scope):
    """Entry by entry: means where a layer writes, sums of gains where it reads; momentum by the same coefficients."""
    model, _, groups, prunable = foldable(name, scope)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"momentum_buffer": torch.randn_like(parameter)}
    average, before = copy.deepcopy(model), copy.deepcopy(model)
    momentum = {key: optimizer.state[parameter]["momentum_buffer"] for key, parameter in model.named_parameters()}
    folded = {group.name: random_clusters(group, seed=1) for group in prunable}
    resized = cup.apply_plan(model, folding_plan(groups, folded), groups)
    cup.carry_optimizer(optimizer, resized)
    cup.carry_ema(average, resized)

    wanted, wanted_momentum = dict(before.state_dict()), dict(momentum)
    for group in prunable:
        into = folded[group.name]
        for place in group.places:
            gains = by_hand(before, group, place, into)
            layer = find_layer(before, place.module)
            keys = ["weight"] if place in group.consumers else ["weight", "bias", "running_mean", "running_var"]
            for key in (f"{place.module}.{key}" for key in keys if getattr(layer, key, None) is not None):
                dim = weight_dim(layer, place.axis) if key.endswith("weight") else 0
                for table in (wanted, wanted_momentum):
                    if key in table:
                        table[key] = merged_slowly(table[key], dim, place.channel_of_index, into, gains)
    assert wanted.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert_close(value.double(), wanted[key].double())
        assert torch.equal(value, average.state_dict()[key])
    for key, parameter in model.named_parameters():
        assert_close(optimizer.state[parameter]["momentum_buffer"], wanted_momentum[key])


def by_hand(model, group, place, into):
    """What each channel counts at a place."""
    size = {stands: into.count(stands) for stands in into}
    if place not in group.consumers:
        return [1 / size[stands] for stands in into]
    last_norm = {"resnet20_cifar": "bn1", "lenet": None}.get(model_name(model))
    if model_name(model) == "mobile_like":
        last_norm = {"project": "bn2", "fc": "bn3"}.get(place.module)
    elif last_norm is not None:
        last_norm = group.name.replace("conv1", last_norm)
    if last_norm is None:
        return [1.0] * group.width
    factors = find_layer(model, last_norm).weight.detach().view(group.width, -1).sum(1).tolist()
    mean = {stands: sum(f for f, s in zip(factors, into, strict=True) if s == stands) / size[stands] for stands in size}
    return [min(max(f / mean[stands], 0.0), 10.0) for f, stands in zip(factors, into, strict=True)]


def model_name(model):
    return {"MobileLike": "mobile_like", "LeNet": "lenet"}.get(type(model).__name__, "resnet20_cifar")


def merged_slowly(tensor, dim, channel_of_index, into, counts):
    rows = tensor.movedim(dim, 0)
    of_channel = [[i for i, own in enumerate(channel_of_index) if own == channel] for channel in range(len(into))]
    found = []
    for index, channel in enumerate(channel_of_index):
        if channel < 0:
            found.append(rows[index])
        elif into[channel] == channel:
            number = of_channel[channel].index(index)
            members = [other for other, stands in enumerate(into) if stands == channel]
            found.append(sum(rows[of_channel[other][number]] * counts[other] for other in members))
    return torch.stack(found).movedim(0, dim)


def test_the_planners_fold_each_cluster_of_the_dendrogram_into_its_representative():
    model, images = make_network("lenet")
    groups = cup.channel_groups(model, images)
    for width in (1, 7, 19, 20):
        [first, *_] = cup.cut_groups(
            model, groups, lambda group, ranking, width=width: min(width, group.width), FOLDING
        )
        into, clusters = np.array(first.ranking.folded(width)), clusters_of(first.ranking.tree, width)
        for cluster in range(width):
            [stands] = set(into[clusters == cluster].tolist())
            assert stands in first.kept and clusters[stands] == cluster
    plan = cup.plan_by_reduction(model, groups, 2.0, FOLDING)
    assert plan.folded.keys() == plan.removed.keys()
    dropping = cup.plan_by_reduction(model, groups, 2.0)
    assert (dict(plan.kept), plan.threshold) == (dict(dropping.kept), dropping.threshold)
    assert not dropping.folded and plan.digest() != dropping.digest()


def test_a_plan_that_folds_is_plain_data_and_older_plans_are_read():
    plan = cup.PrunePlan({"a": (1, 3)}, {"a": 4}, 0.5, folded={"a": (1, 1, 3, 3)})
    again = cup.PrunePlan.from_json(plan.to_json())
    assert again == plan and again.digest() == plan.digest()
    older = {key: value for key, value in json.loads(plan.to_json()).items() if key != "folded"}
    assert cup.PrunePlan.from_json(json.dumps(older)) == cup.PrunePlan({"a": (1, 3)}, {"a": 4}, 0.5)
    with pytest.raises(cup.CupError, match="cannot be joined"):
        cup.PrunePlan({"a": (0, 1, 2)}, {"a": 3}).then(plan)


@pytest.mark.parametrize("into", [(0, 0), (0, 1, 0) + (0,) * 17, (1,) * 20, (0, 0, 7) + (0,) * 17])
def test_a_fold_that_does_not_fit_its_plan_changes_nothing(into):
    model, _ = make_network("lenet")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(cup.CupError, match=r"conv1 folds .* a kept one"):
        cup.apply_plan(model, cup.PrunePlan({"conv1": (0, 2)}, {"conv1": 20}, folded={"conv1": into}))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_half_precision_and_the_memory_format_are_kept():
    model, images = make_network("resnet20_cifar")
    model = model.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    groups = cup.channel_groups(model, images.bfloat16())
    cup.apply_plan(model, cup.plan_by_reduction(model, groups, 2.0, FOLDING), groups)
    for parameter in model.parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.dim() < 4 or parameter.is_contiguous(memory_format=torch.channels_last)


def test_criteria_without_clusters_refuse_to_fold():
    with pytest.raises(cup.CupError, match="fold: found True, allowed: False with l1, or criterion cup"):
        cup.PlanOptions(criterion="l1", fold=True)
    model, images = make_network("lenet")
    with pytest.raises(cup.CupError, match="only where the criterion makes clusters"):
        options = cup.PlanOptions(criterion=cup.CRITERIA["l1"], fold=True)
        cup.plan_by_reduction(model, cup.channel_groups(model, images), 2.0, options)
