"""Planners against a slow twin, their promises about widths and targets, and plans as plain data."""

import dataclasses
import json

import pytest
import torch
from cup_twins import Untouched, make_network, plan_of, random_kept, randomise, slow_plan
from torch import nn

import cup

VARIANTS = ("both", "incoming", "outgoing")


def planned(name, seed=0):
    model, images = make_network(name, seed)
    return model, images, cup.channel_groups(model, images)


# --- the slow twin ---


def chain(kind, seed):
    """A random chain of layers, and an input for it."""
    torch.manual_seed(seed)
    a, b, c = (int(n) for n in torch.randint(5, 14, (3,)))
    if kind == "convs":
        norm = nn.BatchNorm2d(a)
        layers = [nn.Conv2d(3, a, 3, bias=False), norm, nn.ReLU(), nn.Conv2d(a, b, 3), nn.ReLU(), nn.Conv2d(b, c, 1)]
        model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 4))
        return randomise(model), torch.randn(2, 3, 8, 8)
    if kind == "conv flatten linear":
        layers = [nn.Conv2d(2, a, 3), nn.ReLU(), nn.Conv2d(a, b, 3, bias=False), nn.MaxPool2d(2), nn.Flatten()]
        model = nn.Sequential(*layers, nn.Linear(b * 4, c), nn.ReLU(), nn.Linear(c, 4))
        return randomise(model), torch.randn(2, 2, 8, 8)
    layers = [nn.Linear(6, a), nn.ReLU(), nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(), nn.Linear(b, c)]
    return randomise(nn.Sequential(*layers, nn.Tanh(), nn.Linear(c, 3))), torch.randn(2, 6)


@pytest.mark.parametrize("features", VARIANTS)
@pytest.mark.parametrize("kind", ["convs", "conv flatten linear", "linears"])
@pytest.mark.parametrize("sequential", [True, False])
def test_thresholds_keep_what_the_slow_twin_keeps(kind, features, sequential):
    sizes = set()
    for seed in range(3):
        model, images = chain(kind, seed)
        groups = cup.channel_groups(model, images)
        for t in (0.6, 1.2, 1.8, 2.5):
            for use_bias in (True, False):
                options = {"features": features, "use_bias": use_bias, "sequential": sequential}
                plan = cup.plan_by_threshold(model, groups, t, cup.PlanOptions(**options))
                assert dict(plan.kept) == slow_plan(model, t, **options)
                sizes |= {len(kept) / plan.widths[name] for name, kept in plan.kept.items()}
    assert len(sizes) > 8, "the cuts were all alike: this proves little"


def test_order_matters_to_the_planner_as_it_does_to_the_twin():
    """Groups in network order, one after another: at least one case tells it from planning all at once."""
    differs = False
    for seed in range(4):
        model, images = chain("convs", seed)
        groups = cup.channel_groups(model, images)
        for t in (1.2, 1.8, 2.5):
            one_by_one = cup.plan_by_threshold(model, groups, t)
            at_once = cup.plan_by_threshold(model, groups, t, cup.PlanOptions(sequential=False))
            differs |= one_by_one != at_once
    assert differs


# --- widths ---


@pytest.mark.parametrize("name", ["resnet20_cifar", "lenet", "mobile_like"])
def test_counts_are_exact_and_unnamed_groups_keep_their_width(name):
    model, _, groups = planned(name)
    names = [group.name for group in cup.prunable_groups(groups)]
    counts = {name: 1 + 2 * i for i, name in enumerate(names[:2])}
    plan = cup.plan_by_counts(model, groups, counts)
    wanted = {group.name: counts.get(group.name, group.width) for group in cup.prunable_groups(groups)}
    assert plan.new_widths == wanted
    assert plan.removed == {n: plan.widths[n] - w for n, w in wanted.items() if w < plan.widths[n]}


def test_counts_are_exact_among_equal_filters():
    """SciPy's maxclust may give fewer clusters where merges happen at one height; a count is a promise here."""
    model, _, groups = planned("lenet")
    with torch.no_grad():
        model.conv1.weight.zero_()
        model.conv1.bias.zero_()
        model.conv2.weight.zero_()
    for count in (1, 2, 7, 12, 17, 19, 20):
        assert len(cup.plan_by_counts(model, groups, {"conv1": count}).kept["conv1"]) == count


@pytest.mark.parametrize("t", [0.5, 1.5, 2.0, 3.0])
@pytest.mark.parametrize(("round_to", "min_channels"), [(8, 1), (1, 5), (8, 3), (7, 10), (6, 40)])
def test_widths_are_rounded_up_and_never_below_the_minimum_nor_above_the_old_width(t, round_to, min_channels):
    model, _, groups = planned("resnet20_cifar")
    free = cup.plan_by_threshold(model, groups, t, cup.PlanOptions(sequential=False))
    options = cup.PlanOptions(round_to=round_to, min_channels=min_channels, sequential=False)
    plan = cup.plan_by_threshold(model, groups, t, options).new_widths
    for name, width in free.new_widths.items():
        rounded = -(-max(width, min_channels) // round_to) * round_to
        assert plan[name] == min(rounded, free.widths[name])


# Of LeNet's three groups: the first may not go below 4, the second keeps its width, the third may get any.
ALLOWED = {"conv1": (4, 9, 13), "conv2": ()}


@pytest.mark.parametrize("t", [0.5, 1.5, 3.0])
def test_cuts_by_height_are_rounded_up_to_the_next_allowed_width(t):
    model, _, groups = planned("lenet")
    free = cup.plan_by_threshold(model, groups, t, cup.PlanOptions(sequential=False)).new_widths
    widths = cup.plan_by_threshold(model, groups, t, cup.PlanOptions(round_to=ALLOWED, sequential=False)).new_widths
    assert widths["conv1"] == min(width for width in (4, 9, 13, 20) if width >= free["conv1"])
    assert (widths["conv2"], widths["fc1"]) == (50, free["fc1"])


def test_counts_and_min_channels_are_rounded_up_to_the_next_allowed_width_too():
    model, _, groups = planned("lenet")
    counts = {"conv1": 5, "conv2": 3, "fc1": 7}
    widths = cup.plan_by_counts(model, groups, counts, cup.PlanOptions(round_to=ALLOWED)).new_widths
    assert widths == {"conv1": 9, "conv2": 50, "fc1": 7}
    widths = cup.plan_by_counts(model, groups, counts, cup.PlanOptions(round_to=ALLOWED, min_channels=10)).new_widths
    assert widths == {"conv1": 13, "conv2": 50, "fc1": 10}


@pytest.mark.parametrize("target", [1.5, 1.75, 3.0])
def test_a_target_is_reached_on_allowed_widths_alone(target):
    """Widths that no single number's multiples are, 1, 4, 7, ...; the search must walk them to come near the target."""
    model, images, groups = planned("resnet20_cifar")
    allowed = {group.name: tuple(range(1, group.width, 3)) for group in cup.prunable_groups(groups)}
    plan = cup.plan_by_reduction(model, groups, target, cup.PlanOptions(round_to=allowed))
    for name, width in plan.new_widths.items():
        assert width in (*allowed[name], plan.widths[name])
    assert plan.note == ""
    assert flops_reduction(model, images, groups, plan) == pytest.approx(target, rel=0.01)


def test_a_later_cut_never_widens_what_is_narrower_than_the_allowed_widths():
    model, _, groups = planned("lenet")
    groups = cup.apply_plan(model, cup.plan_by_counts(model, groups, {"conv1": 6}), groups).groups
    assert cup.plan_by_counts(model, groups, {"conv1": 5}, cup.PlanOptions(round_to=ALLOWED)).new_widths["conv1"] == 6


def test_a_deeper_cut_never_leaves_more_channels():
    model, _, groups = planned("lenet")
    sizes = [sum(cup.plan_by_threshold(model, groups, t).new_widths.values()) for t in (0.1, 0.5, 1.0, 2.0, 4.0, 1e9)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 3, "one channel in each of the three groups"


def test_a_cut_below_every_merge_removes_nothing_and_says_so():
    model, _, groups = planned("resnet20_cifar")
    plan = cup.plan_by_threshold(model, groups, 1e-9)
    assert plan.removed == {}
    assert plan.new_widths == dict(plan.widths)


# --- target reduction ---


def flops_reduction(model, images, groups, plan):
    before = cup.complexity(model, images).flops
    cup.apply_plan(model, plan, groups)
    return before / cup.complexity(model, images).flops


@pytest.mark.parametrize(
    ("name", "target", "options"),
    [("resnet56_cifar", 2.12, {}), ("resnet20_cifar", 1.3, {}), ("resnet20_cifar", 1.75, {"features": "incoming"})],
)
def test_reduction_lands_on_the_target_within_one_percent(name, target, options):
    model, images, groups = planned(name)
    plan = cup.plan_by_reduction(model, groups, target, cup.PlanOptions(**options))
    assert plan.note == ""
    assert flops_reduction(model, images, groups, plan) == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize("target", [2.0, 5.0])
@pytest.mark.parametrize("name", ["lenet", "dense_like"])
def test_reduction_on_a_small_network_lands_on_the_target_or_notes_how_near_it_came(name, target):
    """One channel of a small network may be worth more than 1% of its FLOPs."""
    model, images, groups = planned(name)
    plan = cup.plan_by_reduction(model, groups, target)
    reached = flops_reduction(model, images, groups, plan)
    noted = f"{reached:.3f}" in plan.note and f"{target:g}" in plan.note
    assert reached == pytest.approx(target, rel=0.01) or noted
    assert reached == pytest.approx(target, rel=0.15) or "out of reach" in plan.note


def test_reduction_is_measured_against_the_dense_flops_that_are_given():
    """Later cuts of a run aim at the dense network's FLOPs, not at those of the network as it is."""
    model, images, groups = planned("resnet20_cifar")
    dense = cup.complexity(model, images).flops
    groups = cup.apply_plan(model, cup.plan_by_reduction(model, groups, 1.5), groups).groups
    plan = cup.plan_by_reduction(model, groups, 2.0, dense_flops=dense)
    cup.apply_plan(model, plan, groups)
    assert dense / cup.complexity(model, images).flops == pytest.approx(2.0, rel=0.01)


def test_a_target_that_was_passed_already_removes_nothing():
    model, images, groups = planned("resnet20_cifar")
    dense = cup.complexity(model, images).flops
    groups = cup.apply_plan(model, cup.plan_by_reduction(model, groups, 2.0), groups).groups
    assert cup.plan_by_reduction(model, groups, 1.5, dense_flops=dense).removed == {}


def test_an_unreachable_target_gives_the_deepest_cut_and_a_note():
    model, images, groups = planned("resnet20_cifar")
    plan = cup.plan_by_reduction(model, groups, 1000.0, cup.PlanOptions(min_channels=3))
    assert set(plan.new_widths.values()) == {3}
    assert "out of reach" in plan.note
    assert f"{flops_reduction(model, images, groups, plan):.3f}" in plan.note


# --- equal inputs, ties ---


@pytest.mark.parametrize("make", ["threshold", "counts", "reduction"])
def test_equal_inputs_give_equal_plans_and_leave_the_model_alone(make):
    model, images, groups = planned("lenet")
    before = Untouched(model)
    planners = {
        "threshold": lambda m, g: cup.plan_by_threshold(m, g, 1.5),
        "counts": lambda m, g: cup.plan_by_counts(m, g, {"conv1": 7, "fc1": 100}),
        "reduction": lambda m, g: cup.plan_by_reduction(m, g, 2.0),
    }
    one = planners[make](model, groups)
    other_model, _ = make_network("lenet")
    other = planners[make](other_model, cup.channel_groups(other_model, images))
    assert one == other
    assert one.digest() == other.digest()
    before.check()


def test_of_dead_filters_the_lowest_index_stays():
    model, _, groups = planned("lenet")
    dead = [3, 4, 9, 17]
    with torch.no_grad():
        model.conv1.weight[dead] = 0
        model.conv1.bias[dead] = 0
        model.conv2.weight[:, dead] = 0
    kept = cup.plan_by_threshold(model, groups, 1e-3).kept["conv1"]
    assert set(range(20)) - set(kept) == {4, 9, 17}


def test_of_equal_filters_the_lowest_index_stays():
    model, _, groups = planned("mlp")
    with torch.no_grad():
        for twin in (400, 12, 499):
            model.fc1.weight[twin] = model.fc1.weight[11]
            model.fc1.bias[twin] = model.fc1.bias[11]
            model.fc2.weight[:, twin] = model.fc2.weight[:, 11]
    assert set(range(500)) - set(cup.plan_by_threshold(model, groups, 1e-3).kept["fc1"]) == {12, 400, 499}


def test_the_filter_with_the_largest_features_stands_for_its_cluster():
    model, _, groups = planned("lenet")
    with torch.no_grad():
        model.conv1.weight[5] = model.conv1.weight[2] * 1.001
        model.conv1.bias[5] = model.conv1.bias[2]
        model.conv2.weight[:, 5] = model.conv2.weight[:, 2]
    assert set(range(20)) - set(cup.plan_by_threshold(model, groups, 0.05).kept["conv1"]) == {2}


# --- plans as data ---


def test_a_plan_survives_its_json():
    model, _, groups = planned("lenet")
    for plan in (cup.plan_by_threshold(model, groups, 1.5), cup.plan_by_reduction(model, groups, 500.0)):
        text = plan.to_json()
        json.loads(text)
        again = cup.PrunePlan.from_json(text)
        assert again == plan
        assert (again.note, again.digest(), again.to_json()) == (plan.note, plan.digest(), text)


def test_the_digest_does_not_depend_on_order_threshold_or_note():
    plan = cup.PrunePlan({"a": (0, 2), "b": (1,)}, {"a": 3, "b": 2}, 0.5)
    same = cup.PrunePlan({"b": (1,), "a": (0, 2)}, {"b": 2, "a": 3}, 0.7, "a note")
    assert plan.digest() == same.digest()


@pytest.mark.parametrize(
    "change",
    [
        {"kept": {"a": (0, 1), "b": (1,)}},
        {"kept": {"a": (0, 2)}},
        {"kept": {"c": (0, 2), "b": (1,)}},
        {"widths": {"a": 4, "b": 2}},
    ],
)
def test_the_digest_changes_with_what_the_plan_does(change):
    plan = cup.PrunePlan({"a": (0, 2), "b": (1,)}, {"a": 3, "b": 2})
    assert dataclasses.replace(plan, **change).digest() != plan.digest()


@pytest.mark.parametrize("name", ["lenet", "resnet20_cifar", "dense_like"])
def test_one_plan_then_another_is_both_at_once(name):
    model, _, groups = planned(name)
    at_once, _, _ = planned(name)
    first = plan_of(groups, random_kept(groups, seed=1))
    resized = cup.apply_plan(model, first, groups)
    second = plan_of(resized.groups, dict(list(random_kept(resized.groups, seed=2).items())[:2]))
    cup.apply_plan(model, second, resized.groups)
    cup.apply_plan(at_once, first.then(second), groups)
    assert str(model) == str(at_once)
    for (key, one), other in zip(model.state_dict().items(), at_once.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


def test_then_takes_in_groups_that_only_the_later_plan_names():
    joined = cup.PrunePlan({"a": (1, 3)}, {"a": 4}).then(cup.PrunePlan({"a": (1,), "b": (0,)}, {"a": 2, "b": 2}))
    assert dict(joined.kept) == {"a": (3,), "b": (0,)}
    assert dict(joined.widths) == {"a": 4, "b": 2}


def test_then_refuses_a_plan_made_for_other_widths():
    with pytest.raises(cup.CupError, match="3 channels, found 2"):
        cup.PrunePlan({"a": (1, 3)}, {"a": 4}).then(cup.PrunePlan({"a": (0,)}, {"a": 3}))


# --- what a caller can get wrong ---


def poison(model, value):
    with torch.no_grad():
        model.conv2.weight[3, 1, 0, 0] = value


LENET = {"conv1": 20, "conv2": 50, "fc1": 500}
MISTAKES = {
    "t is zero": (lambda m, g: cup.plan_by_threshold(m, g, 0.0), "threshold"),
    "t is negative": (lambda m, g: cup.plan_by_threshold(m, g, -0.5), "threshold"),
    "t is NaN": (lambda m, g: cup.plan_by_threshold(m, g, float("nan")), "threshold"),
    "NaN weights": (lambda m, g: (poison(m, float("nan")), cup.plan_by_threshold(m, g, 1.0)), "conv2"),
    "infinite weights": (lambda m, g: (poison(m, float("inf")), cup.plan_by_counts(m, g, {"conv1": 3})), "conv2"),
    "NaN weights, target": (lambda m, g: (poison(m, float("nan")), cup.plan_by_reduction(m, g, 2.0)), "conv2"),
    "target of 1": (lambda m, g: cup.plan_by_reduction(m, g, 1.0), "target"),
    "target is NaN": (lambda m, g: cup.plan_by_reduction(m, g, float("nan")), "target"),
    "counts of an unknown group": (lambda m, g: cup.plan_by_counts(m, g, {"conv9": 3}), "conv9"),
    "counts of a frozen group": (lambda m, g: cup.plan_by_counts(m, g, {"fc2": 3}), "fc2"),
    "count of zero": (lambda m, g: cup.plan_by_counts(m, g, {"conv1": 0}), "1 to 20"),
    "count above the width": (lambda m, g: cup.plan_by_counts(m, g, {"conv1": 21}), "1 to 20"),
    "unknown criterion": (lambda m, g: cup.PlanOptions(criterion="l3"), "cup, l1"),
    "a criterion that cannot rank": (lambda m, g: cup.PlanOptions(criterion=len), "rank"),
    "a criterion's class": (lambda m, g: cup.PlanOptions(criterion=type(cup.CRITERIA["l1"])), "an object"),
    "unknown features": (lambda m, g: cup.PlanOptions(features="all"), "features"),
    "unknown scope": (lambda m, g: cup.PlanOptions(scope="some"), "scope"),
    "round_to of zero": (lambda m, g: cup.PlanOptions(round_to=0), "round_to"),
    "allowed widths that descend": (lambda m, g: cup.PlanOptions(round_to={"conv1": (9, 4)}), "ascending"),
    "allowed width of zero": (lambda m, g: cup.PlanOptions(round_to={"conv1": (0, 4)}), "round_to"),
    "allowed widths of nothing": (
        lambda m, g: cup.plan_by_threshold(m, g, 1.0, cup.PlanOptions(round_to={"conv9": (4,)})),
        "conv9",
    ),
    "min_channels of zero": (lambda m, g: cup.PlanOptions(min_channels=0), "min_channels"),
    "groups of another network": (
        lambda m, g: cup.plan_by_threshold(m, cup.channel_groups(make_network("mlp")[0]), 1.0),
        "",
    ),
    "plan of another network": (lambda m, g: cup.apply_plan(m, cup.PrunePlan({"x": (0,)}, {"x": 2}), g), "'x'"),
    "plan for other widths": (
        lambda m, g: cup.apply_plan(m, cup.PrunePlan({"conv1": (0,)}, {"conv1": 2}), g),
        "conv1 at 2 channels, found 20",
    ),
    "plan for a frozen group": (lambda m, g: cup.apply_plan(m, cup.PrunePlan({"fc2": (0,)}, {"fc2": 10}), g), "fc2"),
    "plan keeps none": (lambda m, g: cup.apply_plan(m, plan_of(g, {"conv2": (0,), "conv1": ()}), g), "conv1"),
    "plan keeps one that is not": (lambda m, g: cup.apply_plan(m, plan_of(g, {"conv1": (3, 20)}), g), "conv1"),
    "plan keeps a negative one": (lambda m, g: cup.apply_plan(m, plan_of(g, {"conv1": (-1, 3)}), g), "conv1"),
    "plan is not sorted": (lambda m, g: cup.apply_plan(m, plan_of(g, {"fc1": (0,), "conv1": (3, 2)}), g), "conv1"),
    "plan keeps one twice": (lambda m, g: cup.apply_plan(m, plan_of(g, {"conv1": (2, 2)}), g), "conv1"),
    "shrink an unknown group": (lambda m, g: cup.shrink_to(m, {"conv1": 3, "conv9": 3}), "conv9"),
    "shrink to nothing": (lambda m, g: cup.shrink_to(m, {"conv2": 3, "conv1": 0}), "1 to 20"),
    "shrink to more": (lambda m, g: cup.shrink_to(m, {"conv2": 3, "conv1": 21}), "1 to 20"),
    "shrink the logits": (lambda m, g: cup.shrink_to(m, {"conv1": 3, "fc2": 3}), "fc2"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_one_line_and_changes_nothing(mistake):
    make, words = MISTAKES[mistake]
    model, _, groups = planned("lenet")
    if "weights" in mistake:  # the mistake itself writes the bad number: make it first, then look for other changes
        poison(model, float("inf") if "infinite" in mistake else float("nan"))
    before = Untouched(model)
    with pytest.raises(cup.CupError) as caught:
        make(model, groups)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    before.check()


@pytest.mark.parametrize("stale_groups", [True, False])
def test_the_same_plan_a_second_time_is_refused_and_changes_nothing(stale_groups):
    model, _, groups = planned("resnet20_cifar")
    plan = plan_of(groups, random_kept(groups))
    cup.apply_plan(model, plan, groups)
    before = Untouched(model)
    with pytest.raises(cup.CupError):
        cup.apply_plan(model, plan, groups if stale_groups else None)
    with pytest.raises(cup.CupError, match="out of date"):
        cup.plan_by_threshold(model, groups, 1.0)
    before.check()


def test_a_network_without_groups_to_prune_says_so():
    model = nn.Sequential(nn.Linear(4, 3))
    groups = cup.channel_groups(model, torch.randn(2, 4))
    for make in (cup.plan_by_threshold, cup.plan_by_reduction):
        with pytest.raises(cup.CupError, match="no group may be pruned"):
            make(model, groups, 2.0)
    with pytest.raises(cup.CupError, match="no group"):
        cup.plan_by_reduction(nn.Sequential(nn.ReLU()), [], 2.0)
