"""Planners: decide which channels stay, by height of the cut, by target FLOPs reduction, or by counts.

A planner never touches the model. It treats the groups in network order, one after another: a group's features are
computed from weights whose inputs the groups before it have already lost (paper, step 4).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from torch import nn

from cup.cluster import clusters_at, cut, representatives
from cup.complexity import complexity, flops_after
from cup.errors import CupError
from cup.features import Features, FeatureVariant
from cup.groups import ChannelGroup, Masks, add_masks, check_groups
from cup.meta import meta_input
from cup.plan import PrunePlan

REDUCTION_TOLERANCE = 0.01
"""How far above a target FLOPs reduction a plan may land, relative."""


@dataclass(frozen=True)
class PlanOptions:
    """How the planners cluster; every planner takes these fields as keyword arguments."""

    features: FeatureVariant = "both"
    """Connections that describe a filter: incoming, outgoing or both."""
    use_bias: bool = True
    """Count a layer's bias among its filters' features, where it has one."""
    scope: Literal["inner", "all"] = "inner"
    """inner = groups that no residual addition touches (the paper's); all = residual groups too."""
    sequential: bool = True
    """Compute a group's features after the cuts before it (the reference); False = all from the weights as they are."""
    round_to: int = 1
    """Widths are rounded up to a multiple of this, cutting the same dendrogram; never above the old width."""
    min_channels: int = 1
    """No group gets narrower than this."""

    def __post_init__(self) -> None:
        checks = [
            ("features", self.features in get_args(FeatureVariant), "both, incoming or outgoing"),
            ("scope", self.scope in ("inner", "all"), "inner or all"),
            ("round_to", self.round_to >= 1, "a whole number from 1"),
            ("min_channels", self.min_channels >= 1, "a whole number from 1"),
        ]
        for name, ok, allowed in checks:
            if not ok:
                raise CupError(f"{name}: found {getattr(self, name)!r}, allowed: {allowed}")

    def width(self, clusters: int, width: int) -> int:
        """The width for a cluster count: at least min_channels, rounded up to round_to, at most the width there is."""
        return min(width, math.ceil(max(clusters, self.min_channels) / self.round_to) * self.round_to)


@dataclass(frozen=True, eq=False)
class GroupCut:
    """How one group was cut: `labels_C[channel]` is its cluster, `kept` the representatives, `tree` SciPy's linkage."""

    group: ChannelGroup
    tree: np.ndarray
    labels_C: np.ndarray
    kept: tuple[int, ...]


def plan_by_threshold(model: nn.Module, groups: Sequence[ChannelGroup], t: float, **options: Any) -> PrunePlan:
    """Cut every group's dendrogram at height t (paper, step 2).

    groups: from `channel_groups(model)`. options: the fields of `PlanOptions`.
    Raises CupError for t <= 0, weights that are not finite, or groups of another network.
    """
    if not t > 0:
        raise CupError(f"threshold t: found {t}, allowed: a number above 0")
    cuts = cut_groups(model, groups, lambda group, tree: clusters_at(tree, t), PlanOptions(**options))
    return _plan(cuts, threshold=t)


def plan_by_counts(
    model: nn.Module, groups: Sequence[ChannelGroup], counts: Mapping[str, int], **options: Any
) -> PrunePlan:
    """Cut each named group to exactly counts[name] clusters (paper, manual mode); the others keep their width.

    Raises CupError for an unknown or frozen group and for a count outside 1..width.
    """
    settings = PlanOptions(**options)
    known = {group.name: group for group in prunable_groups(groups, settings.scope)}
    for name, count in counts.items():
        if name not in known:
            raise CupError(f"no group {name!r} that may be pruned; there are: {', '.join(known)}")
        if not 1 <= count <= known[name].width:
            raise CupError(f"counts[{name!r}]: found {count}, allowed: 1 to {known[name].width}")
    return _plan(cut_groups(model, groups, lambda group, tree: counts.get(group.name, group.width), settings))


def plan_by_reduction(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    target: float,
    *,
    dense_flops: int | None = None,
    **options: Any,
) -> PrunePlan:
    """The cut whose FLOPs reduction lands within 1% of `target`: above it where it can, or as near as there is.

    Bisection on the height t; where a small step of t jumps over the target, the first groups in network order take
    the deeper of the two neighbouring cuts and the rest the shallower one, and if need be single channels of the
    cheapest groups go as well. If even the deepest cut stays short, or no widths lie near, `note` says so.
    dense_flops: FLOPs (the paper's counting) that the reduction is measured against; the model's own if not given.
    Raises CupError for a target <= 1.
    """
    if not target > 1:
        raise CupError(f"target reduction: found {target}, allowed: a number above 1")
    check_groups(model, groups)
    search = _Search(model, groups, PlanOptions(**options), target, dense_flops)
    shallow, deep = search.bracket()
    if deep.reduction < target:
        return replace(deep.plan, note=f"FR {target:g} is out of reach: the deepest cut gives {deep.reduction:.3f}")
    return deep.plan if search.is_near(deep) else search.between(shallow, deep)


def prunable_groups(groups: Iterable[ChannelGroup], scope: str = "inner") -> list[ChannelGroup]:
    """The groups that a planner with this scope cuts, in network order."""
    return [group for group in groups if not group.frozen and (group.inner or scope == "all")]


def cut_groups(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    clusters: Callable[[ChannelGroup, np.ndarray], int],
    options: PlanOptions,
    features: Features | None = None,
) -> list[GroupCut]:
    """Cluster every group in scope, in network order; `clusters(group, tree)` says into how many.

    The shared core of the planners; the model is only read. features: of the groups in scope, read here if not given.
    Raises CupError for weights that are not finite or groups that do not fit the model.
    """
    check_groups(model, groups)
    shrinkable = _some_prunable(groups, options.scope)
    if features is None:
        features = Features(model, shrinkable, options.features, options.use_bias)
    masks: Masks = {}
    cuts: list[GroupCut] = []
    for group in shrinkable:
        found = features.dendrogram(group, masks)
        labels_C = cut(found.tree, options.width(clusters(group, found.tree), group.width))
        cuts.append(GroupCut(group, found.tree, labels_C, representatives(found.squares_C, labels_C)))
        if options.sequential:
            add_masks(masks, group, cuts[-1].kept)
    return cuts


def _some_prunable(groups: Iterable[ChannelGroup], scope: str) -> list[ChannelGroup]:
    shrinkable = prunable_groups(groups, scope)
    if not shrinkable:
        raise CupError(f"no group may be pruned with scope {scope!r}; cup.describe(model) says why")
    return shrinkable


def _plan(cuts: Sequence[GroupCut], threshold: float | None = None) -> PrunePlan:
    kept = {done.group.name: done.kept for done in cuts}
    return PrunePlan(kept, {done.group.name: done.group.width for done in cuts}, threshold)


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A plan and the FLOPs reduction that it leads to."""

    plan: PrunePlan
    reduction: float


class _Search:
    """Looks for the plan that lands on a target reduction; weights and the network's skeleton are read once."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        options: PlanOptions,
        target: float,
        dense_flops: int | None,
    ) -> None:
        self.model, self.groups, self.options, self.target = model, groups, options, target
        self.shrinkable = _some_prunable(groups, options.scope)
        self.floor = {group.name: self.options.width(1, group.width) for group in self.shrinkable}
        self.features = Features(model, self.shrinkable, options.features, options.use_bias)
        self.now = complexity(model, meta_input(groups[0].network.input_shape, batch=1))
        self.dense_flops = dense_flops or self.now.flops

    def is_near(self, candidate: _Candidate) -> bool:
        """At the target or above it by no more than the tolerance."""
        return self.target <= candidate.reduction <= self.target * (1 + REDUCTION_TOLERANCE)

    def bracket(self) -> tuple[_Candidate, _Candidate]:
        """Two cuts around the target, shallow below it and deep at or above it, near it or few channels apart.

        deep falls short of the target only where the smallest widths there are do.
        """
        low, high = 0.0, 1.0
        shallow, deep = self._at_height(low), self._at_height(high)
        while deep.reduction < self.target and deep.plan.new_widths != self.floor:
            low, high, shallow, deep = high, 2 * high, deep, self._at_height(2 * high)
        while not self.is_near(deep) and high - low > 1e-6 * high and _distance(shallow, deep) > self.options.round_to:
            middle = (low + high) / 2
            candidate = self._at_height(middle)
            if candidate.reduction < self.target:
                low, shallow = middle, candidate
            else:
                high, deep = middle, candidate
        return shallow, deep

    def between(self, shallow: _Candidate, deep: _Candidate) -> PrunePlan:
        """Walk from the shallow cut towards the deep one, one group a step, to the first plan near the target.

        Where one channel of a group is more than the tolerance, the walk goes on from below with the groups whose
        channels cost less. If that does not land either, the nearest plan on the way is taken, with a note.
        """
        passed = [shallow]
        for name, goal in deep.plan.new_widths.items():
            while passed[-1].plan.new_widths[name] > goal and passed[-1].reduction < self.target:
                passed.append(self._narrower(passed[-1], name, goal))
        below = [candidate for candidate in passed if candidate.reduction < self.target][-1:]
        while below and not self.is_near(passed[-1]):
            steps = [self._narrower(below[0], name, self.floor[name]) for name in self.floor]
            allowed = self.target * (1 + REDUCTION_TOLERANCE)
            below = [step for step in steps if below[0].reduction < step.reduction <= allowed]
            below = [max(below, key=lambda step: step.reduction)] if below else []
            passed += below
        if self.is_near(passed[-1]):
            return passed[-1].plan
        nearest = min(passed, key=lambda candidate: abs(candidate.reduction - self.target))
        if abs(nearest.reduction - self.target) <= self.target * REDUCTION_TOLERANCE:
            return nearest.plan
        return replace(nearest.plan, note=f"FR {nearest.reduction:.3f} is as near to {self.target:g} as widths allow")

    def _narrower(self, candidate: _Candidate, name: str, floor: int) -> _Candidate:
        """The candidate with one step less in one group, where it is not at its floor yet."""
        counts = candidate.plan.new_widths
        counts[name] = max(floor, counts[name] - self.options.round_to)
        if counts == candidate.plan.new_widths:
            return candidate
        return self._candidate(lambda group, tree: counts[group.name], candidate.plan.threshold)

    def _at_height(self, t: float) -> _Candidate:
        return self._candidate(lambda group, tree: clusters_at(tree, t), t)

    def _candidate(self, clusters: Callable[[ChannelGroup, np.ndarray], int], t: float | None) -> _Candidate:
        plan = _plan(cut_groups(self.model, self.groups, clusters, self.options, self.features), t)
        return _Candidate(plan, self.dense_flops / flops_after(self.model, self.groups, plan, self.now))


def _distance(one: _Candidate, other: _Candidate) -> int:
    """Channels by which two plans' widths differ, all groups together."""
    widths, others = one.plan.new_widths, other.plan.new_widths
    return sum(abs(widths[name] - others[name]) for name in widths)
