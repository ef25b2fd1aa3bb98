"""The answer key: for the same weights, t and variant, the filters and clusters of the reference implementation."""

import functools
import json
from pathlib import Path

import pytest
import torch

import cup
from cup.criteria.ward import clusters_of
from train.network.models import build_model

KEYS = Path(__file__).resolve().parents[3] / "shared" / "reference" / "cup"
NAMES = {"lenet": "lenet", "mlp": "mlp", "resnet20": "resnet20_cifar", "resnet56": "resnet56_cifar"}

pytestmark = pytest.mark.skipif(not KEYS.is_dir(), reason=f"the reference fixtures are not there: {KEYS}")


@functools.cache
def read_key(name):
    return json.loads((KEYS / f"{name}.json").read_text())


@functools.cache
def read_weights(name):
    return torch.load(KEYS / f"{name}.pt", weights_only=True)


@functools.cache
def trace(name):
    """The dense network, its input, its groups and its cost; computed once, never changed by a planner."""
    model = dense_network(name)
    sample = torch.empty(1, *read_key(name)["input"])
    return model, sample, cup.channel_groups(model, sample), cup.complexity(model, sample)


def dense_network(name):
    model = build_model(NAMES[name], 10)
    model.load_state_dict(read_weights(name))
    return model


def all_cases():
    if not KEYS.is_dir():
        return []
    return [
        pytest.param(name, index, id=f"{name}-{case['features']}-{case['t']}")
        for name in NAMES
        for index, case in enumerate(read_key(name)["cases"])
    ]


@pytest.mark.parametrize(("name", "index"), all_cases())
def test_planner_and_surgery_give_the_reference_answer(name, index):
    case = read_key(name)["cases"][index]
    options = {"features": case["features"], "use_bias": case.get("use_bias", True)}
    model, sample, groups, dense = trace(name)

    cuts = cup.cut_groups(model, groups, lambda _, ranking: ranking.width_at(case["t"]), cup.PlanOptions(**options))

    assert [done.group.name for done in cuts] == list(case["layers"])
    for done in cuts:
        wanted = case["layers"][done.group.name]
        numbers = clusters_of(done.ranking.tree, len(done.kept)).tolist()
        clusters = sorted([c for c, cluster in enumerate(numbers) if cluster == number] for number in set(numbers))
        assert list(done.kept) == wanted["kept"], done.group.name
        assert clusters == sorted(wanted["clusters"]), done.group.name

    plan = cup.PrunePlan({d.group.name: d.kept for d in cuts}, {d.group.name: d.group.width for d in cuts})
    pruned = dense_network(name)
    cup.apply_plan(pruned, plan, groups)
    cost = cup.complexity(pruned, sample)
    assert cost.params == case["params"]
    if case["flops"] is not None:
        assert (cost.flops, dense.flops) == (case["flops"], case["base_flops"])


@pytest.mark.parametrize("name", list(NAMES))
def test_plan_by_threshold_keeps_the_reference_filters(name):
    case = read_key(name)["cases"][-1]
    model, _, groups, _ = trace(name)
    options = cup.PlanOptions(features=case["features"], use_bias=case.get("use_bias", True))
    plan = cup.plan_by_threshold(model, groups, case["t"], options)
    assert {n: list(c) for n, c in plan.kept.items()} == {n: layer["kept"] for n, layer in case["layers"].items()}
    assert plan.threshold == case["t"]
