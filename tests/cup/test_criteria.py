"""Criteria: rankings against slow twins, criteria made outside of the project, and weights that stay as they are."""

import numpy as np
import pytest
import torch
from cup_twins import Untouched, make_network, randomise
from scipy.cluster.hierarchy import fcluster
from torch import nn

import cup
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


# --- l1 ---


def slow_sums(model, group, masks):
    """Of each channel the absolute weights that lead to it, one by one, over the layers that write the group."""
    sums = [0.0] * group.width
    for place in group.producers:
        layer = model.get_submodule(place.module)
        weight = layer.weight.detach().double()
        if isinstance(layer, nn.ConvTranspose2d):
            weight = weight.transpose(0, 1)
        stays = masks.get((place.module, "in"), np.ones(weight.shape[1], dtype=bool))
        for row, channel in zip(weight, place.channel_of_index, strict=True):
            if channel >= 0:
                sums[channel] += sum(float(row[i].abs().sum()) for i in np.flatnonzero(stays))
    return sums


@pytest.mark.parametrize("name", ["lenet", "mlp", "resnet20_cifar", "mobile_like", "dense_like", "many_layers"])
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_l1_ranks_by_the_sums_of_absolute_weights_that_are_left(name, scope):
    model, images = make_network(name)
    groups = cup.channel_groups(model, images)
    cuts = cup.cut_groups(
        model, groups, lambda group, _: 1 + group.width // 2, cup.PlanOptions(criterion="l1", scope=scope)
    )
    for at, cut in enumerate(cuts):
        sums = slow_sums(model, cut.group, keep_masks((before.group, before.kept) for before in cuts[:at]))
        assert cut.ranking.heights == pytest.approx(sorted(sums)[:-1])
        assert [sums[channel] for channel in cut.ranking.order_C] == pytest.approx(sorted(sums))


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
    assert ranking.heights == pytest.approx(sorted(slow_sums(model, group, {}))[:-1])


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
    """Kernel windows, 1x1 kernels, a transposed convolution, linear layers, each with biases."""
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 9, 1), nn.ReLU(), nn.ConvTranspose2d(9, 7, 2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(7 * 7 * 7, 11), nn.ReLU(), nn.Linear(11, 6), nn.ReLU())
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
