"""Criteria: rankings against slow twins, criteria made outside of the project, and weights that stay as they are."""

import math

import numpy as np
import pytest
import torch
from cup_twins import Untouched, make_network, randomise
from scipy.cluster.hierarchy import fcluster
from torch import nn

import cup
from cup.criteria import Random
from cup.criteria.cop import correlations
from cup.criteria.features import GroupFeatures
from cup.criteria.ward import clusters_of, removal_order, ward_tree
from cup.tracing.groups import keep_masks

# --- cup: the order of the merges ---


def slow_kept(tree, squares_C, clusters_C):
    """Of each cluster the channel with the largest feature norm, ties to the lowest."""
    best = {}
    for channel, cluster in enumerate(clusters_C):
        if cluster not in best or squares_C[channel] > squares_C[best[cluster]]:
            best[cluster] = channel
    return tuple(sorted(best.values()))


def random_tree(seed):
    """Ward's tree of random features with many equal distances, and as many equal norms."""
    random = np.random.default_rng(seed)
    width = int(random.integers(1, 40))
    rows_CF = random.integers(0, 3, (width, int(random.integers(1, 4)))).astype(float)
    squares_C = (rows_CF**2).sum(1)
    rows_CF -= rows_CF.mean(0)
    return ward_tree(rows_CF @ rows_CF.T), squares_C


def test_every_cut_of_300_trees_with_ties_is_a_prefix_of_the_merges_removals():
    """At each width, and at each height from 0 to above the last merge, the channels that the cut tree would leave."""
    ties = 0
    for seed in range(300):
        tree, squares_C = random_tree(seed)
        ranking = cup.Ranking(removal_order(tree, squares_C), tree[:, 2], tree)
        width, heights = len(squares_C), tree[:, 2]
        ties += width - len(set(squares_C))
        by_width = {count: slow_kept(tree, squares_C, clusters_of(tree, count)) for count in range(1, width + 1)}
        assert {count: ranking.kept(count) for count in by_width} == by_width
        for t in (0.0, *heights, *(heights + 1e-9), 1e9) if width > 1 else ():
            assert ranking.kept(ranking.width_at(t)) == slow_kept(tree, squares_C, fcluster(tree, t, "distance"))
    assert ties > 1000


def test_cup_s_heights_are_those_of_ward_s_merges():
    model, images = make_network("lenet")
    (cut, *_) = cup.cut_groups(model, cup.channel_groups(model, images), lambda group, ranking: 5)
    assert np.array_equal(cut.ranking.heights, cut.ranking.tree[:, 2])
    assert cut.kept == cut.ranking.kept(5)


@pytest.mark.parametrize("name", ["lenet", "many_layers", "dense_like"])
def test_features_whose_connections_come_and_go_have_the_products_of_the_rows_that_are_left(name):
    model, images = make_network(name)
    groups = cup.channel_groups(model, images)
    random = np.random.default_rng(0)
    for group in cup.prunable_groups(groups, "all"):
        features = GroupFeatures(cup.View(model, groups).weights, group)
        for share in (1.0, 0.05, 0.9, 0.8, 0.8, 0.1, 1.0):
            kept = [(other, np.flatnonzero(random.random(other.width) < share)) for other in groups if other != group]
            masks = keep_masks(kept)
            gram, rows_CF = features.gram(masks), features.rows(masks)
            assert features.gram(masks) is gram
            assert np.allclose(gram.squares_C, (rows_CF**2).sum(1), rtol=1e-10)
            rows_CF = rows_CF - rows_CF.mean(0)
            assert np.allclose(gram.products_CC, np.triu(rows_CF @ rows_CF.T), rtol=1e-10, atol=1e-10)


# --- criteria by the size of weights, against loops ---


def outputs_first(layer):
    weight = layer.weight.detach().double()
    return weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight


def slow_filters(model, group, masks):
    """Of each channel all weights that write it, over all layers, without connections to channels that are gone."""
    filters = [[] for _ in range(group.width)]
    for place in group.producers:
        weight = outputs_first(model.get_submodule(place.module))
        stays = masks.get((place.module, "in"), np.ones(weight.shape[1], dtype=bool))
        for row, channel in zip(weight, place.channel_of_index, strict=True):
            if channel >= 0:
                filters[channel] += [float(x) for i in np.flatnonzero(stays) for x in row[i].flatten()]
    return filters


def slow_readers(model, group, masks):
    """Of each channel all weights that read it, over all layers, without outputs that are gone."""
    readers = [[] for _ in range(group.width)]
    for place in group.consumers:
        weight = outputs_first(model.get_submodule(place.module))
        stays = masks.get((place.module, "out"), np.ones(weight.shape[0], dtype=bool))
        for i, channel in enumerate(place.channel_of_index):
            if channel >= 0:
                readers[channel] += [float(x) for o in np.flatnonzero(stays) for x in weight[o, i].flatten()]
    return readers


def slow_l1(model, group, masks):
    return [sum(abs(w) for w in weights) for weights in slow_filters(model, group, masks)]


def slow_l2(model, group, masks):
    return [sum(w * w for w in weights) ** 0.5 for weights in slow_filters(model, group, masks)]


def slow_gm(model, group, masks):
    filters = slow_filters(model, group, masks)
    return [sum(math.dist(one, other) for other in filters) for one in filters]


def slow_max_abs(model, group, masks):
    both = zip(slow_filters(model, group, masks), slow_readers(model, group, masks), strict=True)
    return [max(abs(w) for w in written + read) for written, read in both]


def slow_bn_scale(model, group, masks):
    scores = [0.0] * group.width
    for place in group.followers:
        layer = model.get_submodule(place.module)
        if isinstance(layer, nn.BatchNorm2d):
            for factor, channel in zip(layer.weight.tolist(), place.channel_of_index, strict=True):
                scores[channel] += abs(factor) if channel >= 0 else 0.0
    return scores


SHRUNK = {"mlp": {"fc1": 20, "fc2": 12}, "lenet": {"conv1": 9, "conv2": 12, "fc1": 14}}
"""So that the loops take no seconds."""
SLOW = {"l1": slow_l1, "l2": slow_l2, "gm": slow_gm, "max_abs": slow_max_abs}


@pytest.mark.parametrize("name", ["lenet", "mlp", "resnet20_cifar", "mobile_like", "dense_like", "many_layers"])
@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize("criterion", list(SLOW))
def test_criteria_by_the_size_of_weights_rank_as_their_formulas_do(criterion, name, scope):
    """With residual additions (all), concatenations and bound filters; weights that are gone already do not count."""
    model, images = make_network(name)
    if name in SHRUNK:
        cup.shrink_to(model, SHRUNK[name], images)
    check_ranks(model, images, criterion, scope, SLOW[criterion])


def check_ranks(model, images, criterion, scope, slow):
    groups = cup.channel_groups(model, images)
    options = cup.PlanOptions(criterion=criterion, scope=scope)
    cuts = cup.cut_groups(model, groups, lambda group, _: 1 + group.width // 2, options)
    for at, cut in enumerate(cuts):
        scores = slow(model, cut.group, keep_masks((before.group, before.kept) for before in cuts[:at]))
        assert cut.ranking.heights == pytest.approx(sorted(scores)[:-1])
        assert [scores[channel] for channel in cut.ranking.order_C] == pytest.approx(sorted(scores))


@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet18", "dense_like"])
def test_bn_scale_ranks_by_the_factors_of_the_batch_norms_that_follow(name, scope):
    model, images = make_network(name)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[::2] *= -1
    check_ranks(model, images, "bn_scale", scope, slow_bn_scale)


def test_bn_scale_says_in_one_line_which_group_has_no_batch_norm():
    model, images = make_network("lenet")
    with pytest.raises(cup.CupError, match="no batch norm with factors follows conv1"):
        cup.plan_by_threshold(model, cup.channel_groups(model, images), 1.0, cup.PlanOptions(criterion="bn_scale"))


def test_random_numbers_are_the_same_on_every_machine_and_stay_with_their_channels():
    model, images = make_network("lenet")
    groups, options = cup.channel_groups(model, images), cup.PlanOptions(criterion="random")
    first = cup.plan_by_threshold(model, groups, 0.8, options)
    assert first.kept["conv1"] == (0, 1, 8, 12, 14, 15, 17)
    resized = cup.apply_plan(model, first, groups)
    assert cup.plan_by_threshold(model, resized.groups, 0.8, options).removed == {}
    again, other = make_network("lenet")[0], cup.PlanOptions(criterion=Random(seed=1))
    assert cup.plan_by_threshold(again, groups, 0.8, other).kept["conv1"] != first.kept["conv1"]


# --- cop ---


def slow_cop(model, images, groups):
    """Which channel of which group goes, step by step, everything computed anew at each step."""
    gone = {group.name: set() for group in groups}
    alike = {group.name: slow_correlations(model, group) for group in groups}
    macs = {layer.name: layer.macs for layer in cup.complexity(model, images).layers}
    steps = []
    while any(len(gone[group.name]) < group.width - 1 for group in groups):
        flops, params = (
            {group.name: slow_cost(model, group, groups, gone, unit) for group in groups} for unit in (macs, None)
        )
        candidates = []
        for at, group in enumerate(groups):
            left = [i for i in range(group.width) if i not in gone[group.name]]
            for i in left if len(left) > 1 else ():
                three = sorted((alike[group.name][i][j] for j in left if j != i), reverse=True)[:3]
                importance = 1 - sum(three) / 3
                for costs in (flops, params):
                    importance += 1 - math.log2(costs[group.name]) / max(math.log2(cost) for cost in costs.values())
                candidates.append((round(importance, 9), at, -i))  # ties: the first group, the highest id
        _, at, i = min(candidates)
        gone[groups[at].name].add(-i)
        steps.append((groups[at].name, -i))
    return steps


def slow_correlations(model, group):
    """numpy's Pearson correlations of the outgoing weights, place by place in kernel and block, scaled to 1."""
    tables = []
    for place in group.consumers:
        weight = outputs_first(model.get_submodule(place.module))
        weight = weight.reshape(*weight.shape[:2], -1).numpy()
        blocks = [np.flatnonzero(place.channel_of_index == channel) for channel in range(group.width)]
        for at in range(len(blocks[0])):
            for kernel in range(weight.shape[2]):
                tables.append(np.abs(np.corrcoef([weight[:, block[at], kernel] for block in blocks])))
    mean = np.mean(tables, axis=0) * (1 - np.eye(group.width))
    return mean / mean.max()


def slow_cost(model, group, groups, gone, macs):
    """FLOPs, or parameters where macs is None, of the layers that touch the group, with only living channels."""
    total = 0
    for name in {place.module for place in (*group.producers, *group.consumers)}:
        layer = model.get_submodule(name)
        out, into = outputs_first(layer).shape[:2]
        left = {"out": out, "in": into}
        for other in groups:
            for place in (*other.producers, *other.consumers):
                if place.module == name:
                    left[place.axis] -= sum(channel in gone[other.name] for channel in place.channel_of_index)
        if macs is not None:
            total += 2 * macs[name] / (out * into) * left["out"] * left["in"]
        else:
            total += layer.weight[0, 0].numel() * left["out"] * left["in"] + (layer.bias is not None) * left["out"]
    return total


class SmallResidual(nn.Module):
    """A stem, two residual blocks with batch norm, and a classifier behind a flatten."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.a, self.b = nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.Conv2d(5, 6, 1)
        self.c, self.d = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 3, padding=1)
        self.fc = nn.Linear(6 * 4, 7)

    def forward(self, images):
        x = self.stem(images).relu()
        x = x + self.b(self.a(x).relu())
        x = (x + self.d(self.c(x).relu())).relu()
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_cop_removes_step_by_step_what_everything_computed_anew_would(scope, seed):
    torch.manual_seed(seed)
    model, images = randomise(SmallResidual()), torch.zeros(1, 3, 8, 8)
    groups = cup.channel_groups(model, images)
    some = cup.prunable_groups(groups, scope)
    steps, total = slow_cop(model, images, some), sum(group.width for group in some)
    options = cup.PlanOptions(criterion="cop", scope=scope)
    for count in range(1, len(steps) + 1):
        plan = cup.plan_by_threshold(model, groups, (count + 0.5) / total, options)
        gone = {(name, i) for name, kept in plan.kept.items() for i in range(plan.widths[name]) if i not in kept}
        assert gone == set(steps[:count])


def test_cop_of_three_layers_by_hand():
    """fc1 writes 3 channels. Over fc2's four outputs 0 and 1 do not correlate, and 2 is their sum.

    Correlations 0-2 and 1-2 are 1/sqrt(2), the largest there are, so divided by it 1; 0-1 is 0. r = (1/3, 1/3, 2/3).
    fc2 writes 4 channels, of which all but 3 are read alike: r = (2/3, 2/3, 2/3, 0).
    fc1 and fc2: 2 (2 x 3 + 3 x 4) = 36 FLOPs, 18 parameters; fc2 and fc3: 2 (3 x 4 + 4 x 3) = 48 and 24. So the first
    to go is of fc2, where cost is highest and r is as high: with the highest id of the three that are alike, 2.
    """
    model = nn.Sequential(
        nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False)
    )
    zero, one = torch.tensor([1.0, 1, -1, -1]), torch.tensor([1.0, -1, 1, -1])
    with torch.no_grad():
        model[2].weight[:] = torch.stack([zero, one, zero + one], dim=1)
        model[4].weight[:] = torch.tensor([[1.0, 2, 3, 1], [0, 0, 0, -2], [-1, -2, -3, 1]])
    groups = cup.channel_groups(model, torch.zeros(1, 2))
    assert correlations(cup.View(model, groups).weights, groups[0]) == pytest.approx(
        np.array([[0, 0, 1], [0, 0, 1], [1, 1, 0]])
    )
    options = cup.PlanOptions(criterion="cop")
    by_share = [cup.plan_by_threshold(model, groups, (count + 0.5) / 7, options).kept for count in range(1, 6)]
    # Then fc1's: 36 - 2 x 3 = 30 FLOPs against 48 - 2 x (3 + 3) = 36; r of fc2 is (1/3, 1/3, 0) now, of fc1 still 2/3:
    # 1 - 2/3 + (1 - log2 30 / log2 36) + (1 - log2 15 / log2 18) = 0.447 against 1 - 1/3 = 0.667.
    assert by_share[0] == {"0": (0, 1, 2), "2": (0, 1, 3)}
    assert by_share[1] == {"0": (0, 1), "2": (0, 1, 3)}
    # fc1: r = (0, 0), 2 (2 x 2 + 2 x 3) = 20 FLOPs; fc2: r = (1/3, 1/3, 0), 2 (2 x 3 + 3 x 3) = 30. Of fc2, channel 1.
    assert by_share[2] == {"0": (0, 1), "2": (0, 3)}
    # fc1: 2 (2 x 2 + 2 x 2) = 16 FLOPs; fc2: r = (0, 0), 2 (2 x 2 + 2 x 3) = 20. Of fc2, where cost is higher.
    assert by_share[3] == {"0": (0, 1), "2": (0,)}
    assert by_share[4] == {"0": (0,), "2": (0,)}


class SharedInPart(nn.Module):
    """What c writes belongs to a's channels and to b's."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1), nn.Conv2d(3, 9, 1)

    def forward(self, images):
        return torch.cat([self.a(images), self.b(images)], dim=1) + self.c(images)


def test_l1_counts_of_a_layer_only_the_filters_that_write_the_group():
    """No planner cuts such a group, but a criterion may be asked."""
    model = SharedInPart()
    groups = cup.channel_groups(model, torch.zeros(1, 3, 8, 8))
    (group,) = (group for group in groups if group.name == "a")
    assert [-1 in place.channel_of_index for place in group.producers] == [False, True]
    ranking = cup.CRITERIA["l1"].rank(group, cup.View(model, groups), {})
    assert ranking.heights == pytest.approx(sorted(slow_l1(model, group, {}))[:-1])


def test_l1_of_equal_filters_the_lowest_id_stays():
    model, images = make_network("lenet")
    with torch.no_grad():
        model.conv1.weight[:] = model.conv1.weight[:1]
    options = cup.PlanOptions(criterion="l1")
    plan = cup.plan_by_counts(model, cup.channel_groups(model, images), {"conv1": 3}, options)
    assert plan.kept["conv1"] == (0, 1, 2)


# --- a criterion made here ---


class HighestIdFirst:
    """Heights are the same in all groups, and the more channels are gone before the group, the higher they are."""

    def rank(self, group, view, masks):
        gone = sum(int((~mask).sum()) for mask in masks.values())
        return cup.Ranking(np.arange(group.width)[::-1], (1.0 + gone) * np.arange(1, group.width))


@pytest.fixture(params=["as an object", "by name"])
def options(request, monkeypatch):
    if request.param == "as an object":
        return cup.PlanOptions(criterion=HighestIdFirst())
    monkeypatch.setitem(cup.CRITERIA, "highest", HighestIdFirst())
    return cup.PlanOptions(criterion="highest")


def test_every_planner_takes_a_criterion_from_outside_of_the_project(options):
    model, images = make_network("resnet20_cifar")
    groups = cup.channel_groups(model, images)
    name = cup.prunable_groups(groups)[0].name
    by_height = cup.plan_by_threshold(model, groups, 3.5, options)
    assert by_height.kept[name] == tuple(range(by_height.widths[name] - 3))
    by_counts = cup.plan_by_counts(model, groups, {name: 5}, options)
    assert by_counts.kept[name] == (0, 1, 2, 3, 4)
    by_reduction = cup.plan_by_reduction(model, groups, 1.7, options)
    assert all(kept == tuple(range(len(kept))) for kept in by_reduction.kept.values())
    after = cup.flops_after(model, groups, by_reduction, cup.complexity(model, images))
    assert cup.complexity(model, images).flops / after == pytest.approx(1.7, rel=0.01)


def test_the_deepest_cut_is_found_where_heights_rise_as_other_groups_are_cut(options):
    model, images = make_network("resnet20_cifar")
    plan = cup.plan_by_reduction(model, cup.channel_groups(model, images), 1000.0, options)
    assert set(plan.new_widths.values()) == {1}
    assert "out of reach" in plan.note


def test_a_ranking_of_another_width_is_refused_by_the_group_s_name():
    class Short:
        def rank(self, group, view, masks):
            return cup.Ranking(np.arange(2), np.ones(1))

    model, images = make_network("lenet")
    with pytest.raises(cup.CupError, match="2 channels of conv1, which has 20"):
        cup.plan_by_threshold(model, cup.channel_groups(model, images), 1.0, cup.PlanOptions(criterion=Short()))


@pytest.mark.parametrize(
    ("order", "heights", "words"),
    [
        ([0, 2, 2], [1, 2], "order: found [0, 2, 2]"),
        ([1, 2, 3], [1, 2], "each id from 0 to 2 once"),
        ([0.0, 1.0, 2.0], [1, 2], "order"),
        ([0, 1, 2], [2, 1], "found [2., 1.], allowed: 2 finite numbers from 0, ascending"),
        ([0, 1, 2], [-1, 1], "from 0"),
        ([0, 1, 2], [1, float("nan")], "finite"),
        ([0, 1, 2], [1, float("inf")], "finite"),
        ([0, 1, 2], [1, 2, 3], "2 finite numbers"),
        (range(1000), range(1000), "..."),
    ],
)
def test_a_ranking_that_is_none_is_one_short_line(order, heights, words):
    with pytest.raises(cup.CupError) as caught:
        cup.Ranking(np.array(order), np.array(heights, dtype=float))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


# --- the view ---


def test_a_view_counts_cost_when_asked_and_takes_what_it_is_given():
    model, images = make_network("lenet")
    groups, cost = cup.channel_groups(model, images), cup.complexity(model, images)
    view = cup.View(model, groups)
    assert (view.now, view.dense) == (cost, cost)
    cut = cup.apply_plan(model, cup.plan_by_counts(model, groups, {"conv1": 4}), groups)
    now = cup.View(model, cut.groups, dense=cost)
    assert now.dense is cost and now.now == cup.complexity(model, images)
    assert cup.View(model, cut.groups, cost, now.now).now is now.now


def test_a_view_computes_once_what_it_is_to_remember():
    view = cup.View(*make_network("lenet"))
    calls = []
    assert [view.remember(key, lambda: calls.append(0) or len(calls)) for key in ("a", "b", "a")] == [1, 2, 1]


# --- the model stays as it is ---


def small_network(dtype):
    """Kernel windows, 1x1 kernels, a transposed convolution, linear layers, each with biases and a batch norm."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 9, 1), nn.BatchNorm2d(9)]
    layers += [nn.ConvTranspose2d(9, 7, 2), nn.BatchNorm2d(7), nn.Flatten(), nn.Linear(7 * 7 * 7, 11)]
    model = nn.Sequential(*layers, nn.BatchNorm1d(11), nn.Linear(11, 6), nn.BatchNorm1d(6))
    model.append(nn.Linear(6, 2))
    return randomise(model).to(dtype), torch.zeros(1, 3, 8, 8, dtype=dtype)


PLANNERS = {
    "threshold": lambda model, groups, options: cup.plan_by_threshold(model, groups, 1.0, options),
    "counts": lambda model, groups, options: cup.plan_by_counts(model, groups, {"0": 3}, options),
    "reduction": lambda model, groups, options: cup.plan_by_reduction(model, groups, 1.5, options),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("planner", list(PLANNERS))
@pytest.mark.parametrize("criterion", list(cup.CRITERIA))
def test_planning_leaves_every_weight_as_it_is(criterion, planner, dtype, device):
    model, images = small_network(dtype)
    model = model.to(device, memory_format=torch.channels_last)
    groups = cup.channel_groups(model, images.to(device))
    before = Untouched(model)
    PLANNERS[planner](model, groups, cup.PlanOptions(criterion=criterion))
    before.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_criterion_that_writes_into_the_weights_it_read_is_stopped(dtype):
    model, images = small_network(dtype)
    weights, before = cup.View(model, cup.channel_groups(model, images)).weights, Untouched(model)
    for name in ("0", "2", "4", "7"):
        for read in (weights.filters, weights.connections, weights.bias):
            with pytest.raises(ValueError, match="read-only"):
                read(name)[:] = 0
    before.check()
